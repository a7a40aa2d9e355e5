"""Runs steps of TRL's DistillationTrainer on request, for `benchmarks/run.py --peers`.

The trainer always uses the student's own outputs, and computes its loss in chunks.
"""

from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl_models import StepTimes, arguments, make_model, make_tokenizer
from work import parse_peer_arguments, word


def main() -> None:
    """Trains until no more steps are requested."""
    sizes, on_policy = parse_peer_arguments()
    if not on_policy:
        raise SystemExit("DistillationTrainer has no lambda: it trains on its own outputs only.")
    rows = [{"prompt": " ".join(map(word, prompt))} for prompt in sizes.prompts()]
    trainer = DistillationTrainer(
        model=make_model(sizes, sizes.student),
        teacher_model=make_model(sizes, sizes.teacher),
        args=DistillationConfig(**arguments(sizes), max_completion_length=sizes.output),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(sizes),
        callbacks=[StepTimes()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
