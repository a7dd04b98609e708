"""A student that learns from its own completions, scored by a teacher behind a server (GKD).

    python examples/on_policy.py --url http://localhost:8000/v1 --name TEACHER --tokenizer FOLDER \\
        --student FOLDER --data prompts.jsonl --output runs/on_policy

The server is any that speaks the OpenAI protocol and returns log-probabilities of a prompt's tokens (vLLM, `transformers
serve`, ...). What it was asked is paid for once: a run that is stopped goes on from the answers on disk.
"""

import argparse

from understudy import distill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="Of the server, with /v1.")
    parser.add_argument("--name", required=True, help="The teacher's name at the server.")
    parser.add_argument("--tokenizer", required=True, help="Folder or Hub id of the teacher's tokenizer.")
    parser.add_argument("--student", required=True, help="Folder or Hub id of a causal language model.")
    parser.add_argument("--data", required=True, help="JSONL with `prompt` and `completion`.")
    parser.add_argument("--output", default="runs/on_policy")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--fraction", type=float, default=0.5, help="Of the texts that the student writes itself.")
    parser.add_argument("--tokens", type=int, default=64, help="Of a completion, at most.")
    given = parser.parse_args()

    result = distill(
        task="language_modeling",
        method="jsd",
        options={"temperature": 1.0, "ce_weight": 0.0},
        teacher={"model": given.name, "tokenizer": given.tokenizer, "endpoint": given.url, "score": "top_k:20"},
        student=given.student,
        data={"name": given.data, "max_length": 256, "pack": False},
        on_policy={"fraction": given.fraction, "max_new_tokens": given.tokens},
        trainer={"max_steps": given.steps, "learning_rate": 1e-4},
        output=given.output,
    )
    for name, value in result.metrics.items():
        print(f"{name:>28}  {value:.4f}")
    print(f"Student: {result.folder / 'student'}, report: {result.folder / 'report.html'}")


if __name__ == "__main__":
    main()
