"""Runs steps of TRL's GKDTrainer on request, for `benchmarks/run.py --peers`."""

import torch
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl_models import StepTimes, arguments, make_model, make_tokenizer
from work import parse_peer_arguments


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Builds the fields of the trainer's own collator, from tokens instead of chats."""
    prompts = torch.tensor([row["prompt"] for row in rows])
    outputs = torch.tensor([row["output"] for row in rows])
    tokens = torch.cat([prompts, outputs], dim=1)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.cat([torch.full_like(prompts, -100), outputs], dim=1),
        "prompts": prompts,
        "prompt_attention_mask": torch.ones_like(prompts),
    }


def main() -> None:
    """Trains until no more steps are requested."""
    sizes, on_policy = parse_peer_arguments()
    rows = [
        {"prompt": prompt, "output": output}
        for prompt, output in zip(sizes.prompts(), sizes.outputs(), strict=True)
    ]
    trainer = GKDTrainer(
        model=make_model(sizes, sizes.student),
        teacher_model=make_model(sizes, sizes.teacher),
        args=GKDConfig(
            **arguments(sizes), lmbda=float(on_policy), max_new_tokens=sizes.output, max_length=None
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(sizes),
        callbacks=[StepTimes()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
