"""A server on loopback that scores the tokens of a prompt with a real model, in the ways that real servers have."""

from collections import Counter

import torch

from fault_server import Server, http


class Scorer(Server):
    """`/completions` and `/tokenize` over a causal LM.

    Args:
        way: `vllm` (prompt_logprobs by id, and /tokenize), `ids` (the same, and scores of given ids), `echo` (OpenAI's
            echo, tokens by text), `echo ids` (the same, by id), `plain` (writes, and scores nothing).
        most: tokens of a request from which on it answers 413. max_logprobs: as vLLM's.
        shift: it reads every id as another one, as a model of another tokenizer does. sharp: factor of the logits.
    """

    def __init__(self, model, tokenizer, way="vllm", most=None, max_logprobs=20, shift=0, sharp=1.0):
        super().__init__()
        self.model, self.tokenizer, self.way = model.eval(), tokenizer, way
        self.most, self.max_logprobs, self.shift, self.sharp = most, max_logprobs, shift, sharp
        self.paid = Counter()
        self.bodies = []
        self.sizes = []

    async def answer(self, path, headers, body):
        if path.endswith("/tokenize"):
            return self.tokenize(body) if self.way in ("vllm", "ids") else http(404, {"detail": "Not Found"})
        return self.score(headers, body)

    def tokenize(self, body):
        if "messages" in body:
            ids = self.tokenizer.apply_chat_template(body["messages"], tokenize=True)
            ids = ids if isinstance(ids, list) else ids["input_ids"]
        else:
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
        return http(200, {"tokens": ids, "count": len(ids), "max_model_len": 4096})

    def score(self, headers, body):
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        size = sum(map(len, prompts))
        asked = max(body.get("prompt_logprobs") or 0, body.get("logprobs") or 0)
        if asked > self.max_logprobs:
            said = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.max_logprobs}"
            return http(400, {"error": {"message": said}})
        if self.most is not None and size > self.most:
            return http(413, {"error": {"message": "Request Entity Too Large"}})
        self.bodies.append(body)
        self.sizes.append(size)
        choices = []
        for index, ids in enumerate(prompts):
            self.paid[tuple(ids)] += 1
            read = [(i + self.shift) % self.model.config.vocab_size for i in ids]
            with torch.no_grad():
                log_p = torch.log_softmax(self.model(torch.tensor([read])).logits[0].float() * self.sharp, -1)
            log_p = log_p.roll(-self.shift, -1)  # class i is what the model calls i + shift
            choices.append({"index": index, "text": " x", "finish_reason": "length", **self.scores(body, ids, log_p)})
        used = {"prompt_tokens": size, "completion_tokens": len(prompts)}
        mark = headers.get("x-request-id", "")
        return http(200, {"id": f"cmpl-{mark}", "choices": choices, "usage": used}, [f"x-request-id: {mark}"])

    def scores(self, body, ids, log_p):
        own = [float(log_p[t, i]) for t, i in enumerate(ids[1:])]
        found = {"prompt_token_ids": ids} if body.get("return_token_ids") else {}
        if self.way == "ids" and "prompt_logprob_token_ids" in body:
            start = body["prompt_logprob_start"]
            rows = enumerate(body["prompt_logprob_token_ids"])
            return found | {"prompt_token_id_logprobs": [[float(log_p[start + j, i]) for i in row] for j, row in rows]}
        if self.way in ("vllm", "ids") and body.get("prompt_logprobs") is not None:
            entries = [None]
            for t, token in enumerate(ids[1:]):
                best = log_p[t].topk(body["prompt_logprobs"])
                entry = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)) | {token: own[t]}
                entries.append({str(i): {"logprob": v, "rank": 1, "decoded_token": "?"} for i, v in entry.items()})
            return found | {"prompt_logprobs": entries}
        if self.way in ("echo", "echo ids") and body.get("echo"):
            top = [None]
            for t in range(len(ids) - 1):
                best = log_p[t].topk(body["logprobs"])
                top.append({self.name(i): v for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)})
            names = [*map(self.name, ids), " x"]
            return {"logprobs": {"tokens": names, "token_logprobs": [None, *own, -1.0], "top_logprobs": [*top, {}]}}
        return {"logprobs": None}

    def name(self, token):
        if self.way == "echo ids":
            return f"token_id:{token}"
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
