"""A stand-in for a vLLM server: it speaks the part of vLLM's HTTP protocol that samplers/server.py
uses, on plain http.server, and is no vLLM.

It really loads what it is told to load, with transformers and peft, and really samples from it, one
sequence after the other from its own seed. What vLLM refuses, it refuses with the same status.
Switches make it old, broken, busy or restarted.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

Reply = tuple[int, Any]


class Refused(Exception):
    """An answer with an error's status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StandIn:
    """Serves the model in `folder`; context manager."""

    def __init__(self, folder: Path | str, *, room: int = 128) -> None:
        self.room, self.root = room, str(folder)
        self.dev_mode = self.runtime_lora = self.enable_lora = self.versions = True
        self.processed = self.token_ids = True  # --logprobs-mode; an old vLLM gives no ids
        self.key = ""  # --api-key
        self.down = 0  # this many next requests for completions are answered with 503
        self.dead_after: int | None = None  # completions it gives before it vanishes
        self.spoil: Any = None  # changes the answer to a request for completions
        self.log: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()
        self.restart()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.take(self, "POST")

            def do_GET(self) -> None:
                outer.take(self, "GET")

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def restart(self) -> None:
        """Forget all weights that came after the start."""
        self.base, self.adapters, self.version = load(self.root), {}, "default"

    def asked(self, path: str) -> list[dict[str, Any]]:
        """Bodies of the requests to `path`."""
        return [body for where, body in self.log if where == path]

    # ---- routes

    def take(self, handler: BaseHTTPRequestHandler, method: str) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"] or 0)) or "{}")
        with self.lock:
            if self.dead_after == 0:
                handler.close_connection = True
                return
            try:
                sent = handler.headers["Authorization"]
                if self.key and handler.path.startswith("/v1") and sent != f"Bearer {self.key}":
                    raise Refused(401, "Unauthorized")
                status, said = self.route(handler.path, method, body)
            except Refused as error:
                status, said = error.status, {"error": {"message": str(error)}}
        content = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def route(self, path: str, method: str, body: dict[str, Any]) -> Reply:
        routes = {
            "/health": ("GET", True, lambda _: ""),
            "/v1/models": ("GET", True, self.models),
            "/v1/completions": ("POST", True, self.completions),
            "/v1/load_lora_adapter": ("POST", self.runtime_lora, self.load_adapter),
            "/v1/unload_lora_adapter": ("POST", self.runtime_lora, self.unload_adapter),
            "/collective_rpc": ("POST", self.dev_mode, self.collective_rpc),
            "/reset_prefix_cache": ("POST", self.dev_mode, lambda _: ""),
            "/update_weight_version": ("POST", self.dev_mode and self.versions, self.mark),
            "/weight_info": (
                "GET",
                self.dev_mode and self.versions,
                lambda _: {"weight_version": self.version},
            ),
        }
        verb, there, answer = routes.get(path, ("", False, None))
        if not there or answer is None:
            raise Refused(404, "Not Found")
        if verb != method:
            raise Refused(405, "Method Not Allowed")
        self.log.append((path, body))
        return 200, answer(body)

    def models(self, _: dict[str, Any]) -> dict[str, Any]:
        name = self.root
        cards = [{"id": n, "root": a[1], "parent": name} for n, a in self.adapters.items()]
        base = {"id": name, "root": self.root, "parent": None, "max_model_len": self.room}
        return {"object": "list", "data": [*cards, base]}

    # ---- weights

    def load_adapter(self, body: dict[str, Any]) -> str:
        name, path = body["lora_name"], body["lora_path"]
        if not self.enable_lora:
            raise Refused(500, "LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if name in self.adapters and not body.get("load_inplace"):
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").exists():
            raise Refused(404, f"Loading lora {name} failed: No adapter found for {path}")
        from peft import PeftModel

        with torch.random.fork_rng():
            self.adapters[name] = PeftModel.from_pretrained(load(self.root), path).eval(), path
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload_adapter(self, body: dict[str, Any]) -> str:
        if self.adapters.pop(body["lora_name"], None) is None:
            raise Refused(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def collective_rpc(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["method"] == "reload_weights"
        path = body["kwargs"]["weights_path"]
        if not Path(path).is_dir():
            raise Refused(500, f"Invalid repository ID or local directory specified: {path!r}")
        found = load(path)
        shapes = [[p.shape for p in m.parameters()] for m in (found, self.base)]
        if shapes[0] != shapes[1]:
            raise Refused(500, "AssertionError")
        self.base = found
        return {"results": [None]}

    def mark(self, body: dict[str, Any]) -> dict[str, Any]:
        self.version = body["new_version"]
        return {"success": True, "new_version": self.version}

    # ---- completions

    def completions(self, body: dict[str, Any]) -> Any:
        if self.down:
            self.down -= 1
            raise Refused(503, "Service Unavailable")
        if self.dead_after is not None:
            self.dead_after -= 1
        if body["model"] == self.root:
            model = self.base
        elif body["model"] in self.adapters:
            model = self.adapters[body["model"]][0]
        else:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        vocabulary = model.config.vocab_size
        if any(i >= vocabulary for i in body["prompt"] + body.get("allowed_token_ids", [])):
            raise Refused(400, "allowed_token_ids contains out-of-vocab token id!")
        if len(body["prompt"]) + body["max_tokens"] > self.room:
            raise Refused(400, f"This model's maximum context length is {self.room} tokens.")
        drawn = [draw(model, body, body["seed"] + i, self.processed) for i in range(body["n"])]
        choices = [
            {
                "index": i,
                "text": "",
                "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
                "logprobs": {"token_logprobs": logprobs, "tokens": [str(t) for t in ids]},
            }
            | ({"token_ids": ids, "prompt_token_ids": body["prompt"]} if self.token_ids else {})
            for i, (ids, logprobs) in enumerate(drawn)
        ]
        answer = {"object": "text_completion", "model": body["model"], "choices": choices}
        return self.spoil(answer) if self.spoil else answer


def load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def draw(
    model: Any, body: dict[str, Any], seed: int, processed: bool
) -> tuple[list[int], list[float]]:
    """Token ids and log-probabilities of one completion."""
    generator = torch.Generator().manual_seed(seed)
    ids, logprobs, past = [], [], None
    fed = torch.tensor([body["prompt"]])
    while len(ids) < body["max_tokens"]:
        out = model(input_ids=fed, past_key_values=past, use_cache=True)
        raw, past = out.logits[0, -1].float(), out.past_key_values
        logits = shaped(raw, body, len(ids))
        token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        told = (logits if processed else raw).log_softmax(-1)
        ids, logprobs = [*ids, token], [*logprobs, float(told[token])]
        if token in body["stop_token_ids"]:
            break
        fed = torch.tensor([[token]])
    return ids, logprobs


def shaped(raw: torch.Tensor, body: dict[str, Any], done: int) -> torch.Tensor:
    """Logits as vLLM's sampler changes them, in its order."""
    logits = raw.clone()
    if allowed := body.get("allowed_token_ids"):
        kept = logits[allowed].clone()
        logits[:] = -torch.inf
        logits[allowed] = kept
    if done < body["min_tokens"]:
        logits[body["stop_token_ids"]] = -torch.inf
    for token, bias in body["logit_bias"].items():
        logits[int(token)] += max(-100.0, min(100.0, bias))
    logits /= body["temperature"]
    if body["top_k"] > 0:
        logits[logits < logits.topk(body["top_k"]).values[-1]] = -torch.inf
    if body["top_p"] < 1.0:
        order = logits.argsort(descending=True)
        before = logits[order].softmax(-1).cumsum(-1) - logits[order].softmax(-1)
        logits[order[before >= body["top_p"]]] = -torch.inf
    return logits
