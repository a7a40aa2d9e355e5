"""Teachers: the models whose predictions the student is trained to match.

A teacher is one or more frozen networks (`network_teachers`), the student itself at some time of
the run (`self_teachers`), or a set of precomputed distributions (`stored_teacher`). All of them
implement `AbstractTeacher`; no other module asks for the kind. Gin files and notebooks use the
names in this module, e.g. `@teachers.Teacher()`.
"""

from gkd_jax.distillation.network_teachers import (
    AbstractTeacher,
    CrossTokenizerTeacher,
    RoutedTeachers,
    Teacher,
    TeacherMixture,
)
from gkd_jax.distillation.self_teachers import (
    AverageStudent,
    InitialStudent,
    LiveStudent,
    SelfTeacher,
)
from gkd_jax.distillation.stored_teacher import StoredTeacher

__all__ = [
    "AbstractTeacher",
    "AverageStudent",
    "CrossTokenizerTeacher",
    "InitialStudent",
    "LiveStudent",
    "RoutedTeachers",
    "SelfTeacher",
    "StoredTeacher",
    "Teacher",
    "TeacherMixture",
]
