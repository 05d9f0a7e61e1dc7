"""Hugging Face's Trainer: compile the model, and hand it over; the Trainer puts DDP around it.

`torchrun --nproc-per-node 2 examples/transformers_trainer.py`. TrainingArguments(torch_compile_backend="dct") is refused by transformers,
which knows its own list of backends. ``model.compile`` asks torch alone.
"""

import tempfile
from typing import Any

import torch
from language import LENGTH, TOKENS, batches, run
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


class Sentences(Dataset):
    """Token sequences as ``language.batches`` makes them, each for its own label."""

    def __init__(self, seed: int, batches_: int = 100) -> None:
        self.rows = torch.cat(list(batches(seed, batches_)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(options: dict[str, Any], steps: int = 300, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss of the last tenth of the steps, and the model."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_positions=LENGTH + 1, n_embd=64, n_layer=2, n_head=4))
    model.compile(backend="dct", options=options)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            max_steps=steps,
            learning_rate=3e-3,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Sentences(seed))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1], trainer.model_wrapped


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
