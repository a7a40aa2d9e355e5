"""Teachers: the models whose predictions the student is trained to match.

A teacher is one or more frozen networks (`networks`), the student itself at some time of the run
(`self_teachers`), or a set of precomputed distributions (`stored`). All of them implement
`AbstractTeacher`, so other modules do not distinguish between them. Gin files and notebooks use the
names in this package, e.g. `@teachers.Teacher()`.
"""

from gkd_jax.distillation.teachers.networks import (
    AbstractTeacher,
    CrossTokenizerTeacher,
    RoutedTeachers,
    Teacher,
    TeacherMixture,
)
from gkd_jax.distillation.teachers.self_teachers import (
    AverageStudent,
    InitialStudent,
    LiveStudent,
    SelfTeacher,
)
from gkd_jax.distillation.teachers.stored import StoredTeacher

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
