"""Runs GKD without gin: fine-tunes a teacher and a student, then distils on-policy.

    python examples/gkd_in_python.py

It takes a minute or two. The models are tiny and the steps few, so that the student learns little.
"""

import dataclasses

from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.data.recipes import arithmetic
from gkd_jax.data.vocabularies import ByteVocabulary
from gkd_jax.distillation.optimizers import AdamW, Constant
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment import Evaluation, Experiment, Student
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.objectives.divergences import GeneralizedJSD, NegativeLogLikelihood
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective
from gkd_jax.run_modes.train import train


def t5(width: int) -> T5:
    sizes = dict(emb_dim=width, mlp_dim=2 * width, num_encoder_layers=2, num_decoder_layers=2)
    return T5(T5Config(vocab_size=259, num_heads=4, head_dim=16, dtype="float32", **sizes))


data = DatasetConfig(
    arithmetic(), "train", {"inputs": 88, "targets": 40}, batch_size=32, vocabulary=ByteVocabulary()
)
sft = Experiment(
    student=Student(t5(64)),
    objective=Objective(NegativeLogLikelihood()),
    outputs=OutputMix(student_data_fraction=0.0),
    train_data=data,
    optimizer=AdamW(Constant(2e-3, warmup_steps=20)),
    num_steps=100,
    model_dir="runs/example/teacher",
    evaluation=Evaluation(dataclasses.replace(data, split="validation", num_examples=64)),
)
train(sft)
small = dataclasses.replace(sft, student=Student(t5(32)), model_dir="runs/example/student")
train(small)
gkd = dataclasses.replace(
    small,
    student=Student(t5(32), initial_checkpoint="runs/example/student"),
    teacher=Teacher(t5(64), checkpoint="runs/example/teacher"),
    objective=Objective(GeneralizedJSD(beta=0.5)),
    outputs=OutputMix(student_data_fraction=1.0),
    model_dir="runs/example/distilled",
)
print(train(gkd).scores)
