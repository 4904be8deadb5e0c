"""Hugging Face's Trainer and peft: a causal language model whose adapters alone are trained and perturbed."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_breast_cancer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fastsam import SAM
from fastsam.integrations.transformers import SAMTrainerMixin

LENGTH = 32


class SAMTrainer(SAMTrainerMixin, Trainer):
    pass


def passages():
    """Pieces of a data set's description, as bytes below 128."""
    codes = torch.tensor([ord(c) % 128 for c in load_breast_cancer().DESCR])
    return [{"input_ids": piece, "labels": piece} for piece in codes.split(LENGTH) if len(piece) == LENGTH]


def tiny_gpt2():
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=128, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, **dropout)
    return get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))


def main():
    model = tiny_gpt2()
    adapters = [p for p in model.parameters() if p.requires_grad]
    opt = SAM(adapters, torch.optim.AdamW, rho=0.01, lr=1e-2)
    args = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SAMTrainer(model, args, train_dataset=passages(), optimizers=(opt, None))
    print(f"mean loss {trainer.train().training_loss:.3f}")
    return model


if __name__ == "__main__":
    main()
