"""Hugging Face's Trainer: which of scikit-learn's descriptions of its data sets a few characters are from."""

import tempfile

import torch
from sklearn import datasets
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fastsam import ESAM
from fastsam.integrations.transformers import SAMTrainerMixin

LENGTH = 32


class SAMTrainer(SAMTrainerMixin, Trainer):
    pass


def passages():
    """Pieces of the descriptions, as bytes below 128, with the number of the description."""
    texts = [load().DESCR for load in (datasets.load_iris, datasets.load_wine, datasets.load_digits)]
    pieces = [(text[i : i + LENGTH], k) for k, text in enumerate(texts) for i in range(0, len(text) - LENGTH, LENGTH)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        {"input_ids": torch.tensor([ord(c) % 128 for c in pieces[i][0]]), "labels": torch.tensor(pieces[i][1])}
        for i in order
    ]


def tiny_bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=128, num_labels=3, **sizes, **dropout))


def main():
    model = tiny_bert()
    opt = ESAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-3)
    args = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=16,
        num_train_epochs=2,
        lr_scheduler_type="linear",
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
