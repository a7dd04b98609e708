"""What the guides take for granted: a reader's files, as the pages print them, and small models in the place of large ones."""

import json
import wave

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from fault_server import Upstream
from served_cases import made
from understudy.data import train_tokenizer
from understudy.data.retrieval_batches import train_encoder_tokenizer
from understudy.generation import Prompt
from understudy.models import load_causal_lm
from understudy.models.vision_language import load_vision_language, new_processor

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")


def guides(folder):
    """Every file and model that a guide names."""
    write_rankings(folder)
    write_rankers(folder)
    write_graph(folder)
    write_reasoning(folder)
    write_pictures(folder)
    write_scans(folder)
    made(folder / "oracle")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rankings(folder):
    """A help desk: a folder as BEIR lays its sets out, and triples with scores."""
    things = "refund password invoice parcel contract voucher".split()
    (folder / "helpdesk" / "qrels").mkdir(parents=True)
    docs = [
        {"_id": f"d{i}", "title": f"Your {thing}", "text": f"Where you find the {thing} of order {i}."}
        for i, thing in enumerate(things * 8, 1)
    ]
    asked = [{"_id": f"q{i}", "text": f"where is the {thing} of order {i}"} for i, thing in enumerate(things * 8, 1)]
    lines(folder / "helpdesk" / "corpus.jsonl", docs)
    lines(folder / "helpdesk" / "queries.jsonl", asked)
    graded = "".join(f"q{i}\td{i}\t1\n" for i in range(1, 49))
    (folder / "helpdesk" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + graded)
    pairs = [{"query": q["text"], "positive": d["text"]} for q, d in zip(asked, docs, strict=True)]
    lines(folder / "triples.jsonl", [{**p, "negative": docs[i - 5]["text"]} for i, p in enumerate(pairs)])
    (folder / "scored.tsv").write_text(
        "pos_score\tneg_score\tquery\tpositive\tnegative\n"
        + "".join(
            f"{8.1 + i % 3}\t{-2.4 - i % 5}\t{q['text']}\t{d['text']}\t{docs[i - 5]['text']}\n"
            for i, (q, d) in enumerate(zip(asked, docs, strict=True))
        )
    )


def write_rankers(folder):
    """A sentence encoder, saved by sentence-transformers, and a cross-encoder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    texts = [json.loads(line)["text"] for line in (folder / "helpdesk" / "corpus.jsonl").read_text().splitlines()]
    tokenizer = train_encoder_tokenizer(texts * 4, 400)
    for name, width in (("encoder", 8), ("large", 12)):
        parts = [modules.StaticEmbedding(tokenizer, embedding_dim=width)]
        SentenceTransformer(modules=parts, device="cpu").save(str(folder / name))
    words = AutoTokenizer.from_pretrained(folder / "encoder")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder / "cross")
    words.save_pretrained(folder / "cross")


def write_graph(folder, number=120):
    """Papers with a topic and three measurements, and who cites whom; some topics are not known."""
    chance = torch.Generator().manual_seed(0)
    topics = [i % 3 for i in range(number)]
    noise = torch.randn(number, 3, generator=chance) * 0.2
    rows = ["topic,w1,w2,w3"]
    for i, topic in enumerate(topics):
        values = [(topic == j) + noise[i, j].item() for j in range(3)]
        rows.append(f"{topic if i % 10 != 1 else -1}," + ",".join(f"{v:.2f}" for v in values))
    (folder / "papers.csv").write_text("\n".join(rows) + "\n")
    links = [f"{i},{(i + step) % number}" for i in range(number) for step in (3, 6) if i + step < number]
    (folder / "citations.csv").write_text("citing,cited\n" + "\n".join(links) + "\n")


def questions():
    """Sums of two numbers, all 10 or 12: a model that has learned to say one of them is often right."""
    found = []
    for total in (10, 12):
        for a in range(2, 9):
            found += [
                {
                    "question": f"{name} has {a} apples and gets {total - a} more. How many apples are that?",
                    "rationale": f"{a} + {total - a} = {total}",
                    "answer": str(total),
                }
                for name in NAMES
            ]
    return found[::5] + found[1::5]


def write_reasoning(folder, steps=120):
    """Questions, files of other tasks that write text, a prompt, and a model that answers by chance in the right form."""
    rows = questions()
    lines(folder / "questions.jsonl", rows)
    (folder / "solve.txt").write_text(
        "{{ question }}\n\nThink in short steps. Write the final answer alone on the last line, behind ####.\n"
    )
    (folder / "events.txt").write_text("PersonX loses the keys\nPersonX misses the train\n")
    (folder / "concepts.txt").write_text("bicycle\numbrella\n")
    lines(folder / "customers.jsonl", [{"prompt": f"My parcel {i} has not come.", "type": "parcel"} for i in range(40)])
    (folder / "solver").mkdir()
    prompts = [Prompt.load(p) for p in ("question", "solve_steps", "solve_answer", str(folder / "solve.txt"))]
    texts, chance = [], torch.Generator().manual_seed(0)
    for i, row in enumerate(rows * 2):
        said = " it is {0}\n#### {0}".format((10, 12)[int(torch.randint(2, (1,), generator=chance))])
        prompt = prompts[i % len(prompts)].render(question=row["question"])
        texts.append((prompt if i % len(prompts) == 0 else f"user: {prompt}\nassistant: ") + said)
    words = train_tokenizer(texts, 360)
    words.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = load_causal_lm("llama:hidden=32,layers=1,heads=2", tokenizer=words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = [torch.tensor([*words(text)["input_ids"], words.eos_token_id]) for text in texts]
    for step in range(steps):
        some = [ids[(8 * step + i) % len(ids)] for i in range(8)]
        rows_of = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=-100)
        model(input_ids=rows_of.clamp(min=0), labels=rows_of).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder / "solver")
    words.save_pretrained(folder / "solver")


def write_pictures(folder):
    """What the guides of generation, of images with text and of modalities take for granted."""
    for name in ("photos", "pictures"):
        (folder / name).mkdir()
    rows, sounds = [], np.sin(np.arange(1600) / np.array([[2], [9]]))
    for i in range(30):
        shade = Image.fromarray(np.full((24, 24, 3), 8 * i, np.uint8))
        shade.save(folder / "photos" / f"{i + 1:04d}.png")
        shade.save(folder / "pictures" / f"{i}.png")
        with wave.open(str(folder / "pictures" / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes((9000 * sounds[i % 2]).astype("<i2").tobytes())
        rows.append({"image": f"pictures/{i}.png", "prompt": "Which shade is this?", "completion": f" shade {i}"})
    lines(folder / "captions.jsonl", rows)
    better = [{k: row[k] for k in ("image", "prompt")} | {"chosen": row["completion"]} for row in rows]
    lines(folder / "better.jsonl", [{**row, "rejected": f" shade {i + 1}"} for i, row in enumerate(better)])
    heard = [{"image": row["image"], "audio": f"pictures/{i}.wav"} for i, row in enumerate(rows)]
    lines(folder / "machines.jsonl", [{**row, "label": ("low", "high")[i % 2]} for i, row in enumerate(heard)])
    encoded = [(folder / "photos" / f"{i + 1:04d}.png").read_bytes() for i in range(30)]
    pq.write_table(pa.table({"image": encoded, "worse": encoded[1:] + encoded[:1]}), folder / "rated.parquet")
    processor = new_processor(train_tokenizer([r["prompt"] + r["completion"] for r in rows], 300), image=24, patch=8)
    for name, width in (("seer", 32), ("small_seer", 16)):
        torch.manual_seed(0)
        model = load_vision_language(f"llava:hidden={width},layers=2,heads=2,vision=16", processor=processor)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def write_scans(folder):
    """Scans of x, y, z and how much came back, as KITTI has them."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 4), ("validation", 2), ("test", 2)):
        (folder / "scans" / split).mkdir(parents=True)
        for i in range(number):
            points = rng.uniform(-9, 9, (300, 4)).astype("<f4")
            points.tofile(folder / "scans" / split / f"{i:06d}.bin")


class Answers(Upstream):
    """A served teacher that answers every question of the file in the asked form, and rightly."""

    def __init__(self):
        super().__init__(key=None)

    def reply(self, path, headers, body):
        reply, more = super().reply(path, headers, body)
        asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        row = next((r for r in questions() if r["question"] in asked), {"rationale": "", "answer": "10"})
        text = f"{row['rationale']}\n#### {row['answer']}"
        choice = reply["choices"][0]
        choice.update({"message": {"role": "assistant", "content": text}} if "message" in choice else {"text": text})
        return reply, more
