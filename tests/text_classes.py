"""Small classifiers and sets of labelled texts, as transformers and users save them."""

import csv
import json

import numpy as np

WORDS = {"good": ["great", "lovely", "superb", "warm"], "bad": ["awful", "dull", "poor", "cold"]}
FILLER = "the film was and its music a story seemed with actors scene very quite".split()


def reviews(number, seed=0):
    """Texts whose class is that of the one word that tells."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        label = ("bad", "good")[i % 2]
        words = list(rng.choice(FILLER, 5))
        words.insert(int(rng.integers(0, 6)), str(rng.choice(WORDS[label])))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def as_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def classifier(folder, labels=("good", "bad"), steps=60, rows=None, **sizes):
    """A BERT classifier with a WordPiece tokenizer, trained and saved by plain transformers."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True)
    words = [*FILLER, *WORDS["good"], *WORDS["bad"]]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32} | sizes
    config = BertConfig(vocab_size=len(tokenizer), **sizes)
    config.id2label, config.label2id = dict(enumerate(labels)), {n: i for i, n in enumerate(labels)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        rows = rows or reviews(200, seed=1)
        seen = tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
        wanted = torch.tensor([labels.index(r["label"]) for r in rows])
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(steps):
            optimiser.zero_grad()
            model(**seen, labels=wanted).loss.backward()
            optimiser.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
