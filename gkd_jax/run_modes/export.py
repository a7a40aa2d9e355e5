"""Run mode `export`: writes the student as a directory for `transformers`, servers or T5X."""

import json
from typing import Any

import jax
from absl import logging
from etils import epath

from gkd_jax.checkpoints import hf, peft, t5x
from gkd_jax.common import hub
from gkd_jax.common.array_types import Params
from gkd_jax.data.vocabularies import Vocabulary
from gkd_jax.experiment import prepare
from gkd_jax.experiment.checks import exports
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.plan import num_params
from gkd_jax.models import lora, stacking
from gkd_jax.models.base import LanguageModel
from gkd_jax.training import parameters

_GENERATION = "generation_config.json"
_CARD = """---
library_name: {library}
tags: [distillation, gkd_jax]
---

# {name}

A student distilled with gkd_jax ({source}, {num_params:,} parameters, {written}).

| | |
|---|---|
| teacher | {teacher} |
| started from | {start} |
| objective | `{objective}` |
| outputs trained on | `{outputs}`, `{rollout}` |
| data | {data} |
| steps | {step} of {num_steps}, {batch} each |
| optimizer | `{optimizer}` |
| vocabulary | {vocabulary} |

{metrics}
"""


def export(experiment: Experiment) -> str:
    """Writes the student's newest parameters with the settings of `Experiment.export`.

    The directory has weights in safetensors, config.json, generation_config.json, the tokenizer's
    files, and a model card that describes the run. In two cases other files replace the weights,
    config.json and generation_config.json:

    - in T5X's format, `checkpoint_<step>`;
    - if only the adapters are written, the weights of the adapters and adapter_config.json.

    The directory is written under a temporary name, and renamed when it is complete.

    Returns:
      The path of the directory.

    Raises:
      ConfigurationError: lists everything that is wrong with the experiment.
    """
    prepare.prepare(experiment, run_mode="export")
    settings = experiment.export
    assert settings is not None
    if jax.process_count() > 1:
        raise ValueError(
            f"--run_mode=export runs in one process; got {jax.process_count()}. Run it on one host."
        )
    student = parameters.student_to_use(experiment)
    output = epath.Path(settings.output)
    partial = epath.Path(f"{settings.output.rstrip('/')}.partial")
    if partial.exists():
        partial.rmtree()
    if settings.format == "t5x":
        _write_t5x(experiment, student, partial)
    else:
        write = _write_adapters if settings.adapters else _write_model
        files = write(experiment, student.params, partial)
        logging.info("export: %d files of weights", len(files) - 1)
    has_generation = settings.format == "hf" and not settings.adapters
    for name, file in exports.tokenizer_files(experiment).items():
        if has_generation or name != _GENERATION:
            (partial / name).write_bytes(file.read_bytes())
    generation = partial / _GENERATION
    if has_generation and not generation.exists():
        config = experiment.student.model.config
        contents = _generation_config(config, experiment.train_data.vocabulary)
        generation.write_text(json.dumps(contents, indent=2) + "\n")
    (partial / "README.md").write_text(_card(experiment, student))
    partial.rename(output)
    logging.info("export: %s is complete", output)
    return str(output)


def _write_model(experiment: Experiment, params: Params, folder: epath.Path) -> list[str]:
    """Writes the whole student, with adapters merged into the base."""
    settings, student = experiment.export, experiment.student
    assert settings is not None
    start, config = student.initial_checkpoint, None
    if start is not None and hf.is_hf_checkpoint(hub.find(start)):
        config = hf.read_config(hub.find(start))
    model, params = _merged(student.model, params)
    return hf.write_hf_checkpoint(
        folder, model, params, dtype=settings.dtype, config=config,
        shard_bytes=settings.shard_bytes,
    )  # fmt: skip


def _write_t5x(
    experiment: Experiment, student: parameters.LoadedParams, folder: epath.Path
) -> None:
    """Writes the whole student, with adapters merged, as a T5X checkpoint."""
    assert experiment.export is not None
    _, params = _merged(experiment.student.model, student.params)
    t5x.write_t5x_checkpoint(
        folder / f"checkpoint_{student.step}", stacking.unstack(params), step=student.step,
        dtype=experiment.export.dtype,
    )  # fmt: skip


def _merged(model: LanguageModel, params: Params) -> tuple[LanguageModel, Params]:
    if isinstance(model, lora.LoRA):
        return model.model, model.merge(params)
    return model, params


def _write_adapters(experiment: Experiment, params: Params, folder: epath.Path) -> list[str]:
    """Writes only the adapters, in PEFT's format."""
    model = experiment.student.model
    assert isinstance(model, lora.LoRA)
    adapters, _ = lora.split(model, params)
    start = experiment.student.initial_checkpoint
    return peft.write_adapters(folder, model, adapters, base=start)


def _generation_config(config: Any, vocabulary: Vocabulary) -> dict[str, Any]:
    ends: Any = list(vocabulary.eos_ids)
    contents = {
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": vocabulary.pad_id,
    }
    if vocabulary.bos_id is not None:
        contents["bos_token_id"] = vocabulary.bos_id
    if hasattr(config, "decoder_start_id"):
        contents["decoder_start_token_id"] = config.decoder_start_id
    return contents


def _card(experiment: Experiment, student: parameters.LoadedParams) -> str:
    teacher, data = experiment.teacher, experiment.train_data
    task = data.task if isinstance(data.task, str) else data.task.name
    assert experiment.export is not None
    return _CARD.format(
        library="t5x" if experiment.export.format == "t5x" else "transformers",
        name=epath.Path(experiment.export.output).name,
        source=student.source,
        num_params=num_params(experiment.student.model),
        written=_written(experiment),
        teacher="none" if teacher is None else teacher.describe(experiment.start),
        start=experiment.start,
        objective=experiment.objective,
        outputs=experiment.outputs,
        rollout=experiment.rollout.method,
        data=f"{task}, split {data.split}",
        step=student.step,
        num_steps=experiment.num_steps,
        batch=data.batch,
        optimizer=experiment.optimizer,
        vocabulary=data.vocabulary.name,
        metrics=_metrics(experiment, student.step),
    )


def _written(experiment: Experiment) -> str:
    model, settings = experiment.student.model, experiment.export
    assert settings is not None
    if settings.adapters:
        return "adapters alone, written in float32"
    merged = ", adapters merged" if lora.has_adapters(model) else ""
    return f"written in {settings.dtype}{merged}"


def _metrics(experiment: Experiment, step: int) -> str:
    """Returns the newest evaluation up to this step as a Markdown table."""
    path = epath.Path(experiment.model_dir) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    measured = [
        row
        for row in rows
        if row.get("step", step + 1) <= step and any(name.startswith("eval/") for name in row)
    ]
    if not measured:
        return "No evaluation was made."
    newest = measured[-1]
    lines = [
        f"| {name.removeprefix('eval/')} | {value:.6g} |"
        for name, value in newest.items()
        if name.startswith("eval/") and isinstance(value, int | float)
    ]
    return "\n".join([f"| evaluation at step {newest['step']} | |", "|---|---|", *lines])
