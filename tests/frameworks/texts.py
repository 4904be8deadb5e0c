"""Tiny language models from their configurations, and token batches."""

import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

ROWS, LENGTH, VOCABULARY = 8, 6, 32


def bert(seed=1):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def gpt2(seed=1):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    # without it the Trainer counts the first token of each row too, which the model's shift drops
    model.loss_type = "ForCausalLM"
    return model


def classified(batches, seed=0):
    """Sequences with a class each: a list of items."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batches * ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, 3, (batches * ROWS,), generator=generator)
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


def continued(batches, seed=0):
    """Sequences to continue, whose first few tokens do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batches * ROWS, LENGTH), generator=generator)
    ignored = torch.arange(LENGTH)[None] < torch.randint(0, LENGTH - 1, (len(ids), 1), generator=generator)
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, ids.masked_fill(ignored, -100), strict=True)]


def stacked(items, start, rows=ROWS):
    """A batch of items: ids and labels."""
    part = items[start : start + rows]
    return torch.stack([i["input_ids"] for i in part]), torch.stack([i["labels"] for i in part])
