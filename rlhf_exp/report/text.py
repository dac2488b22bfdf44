"""What a run says in words: the closing table and the model card."""

import json
from typing import Any

ROWS = {
    "gold": "gold",
    "proxy": "proxy",
    "win_rate": "win rate",
    "accuracy": "accuracy",
    "kl": "KL (nats)",
    "length": "tokens",
}


def as_table(summary: dict[str, Any]) -> str:
    """Before -> after on the held-out prompts, with 95 % bootstrap intervals; the win rate is the
    share of prompts on which gold is above the start policy's.
    """
    lines = [f"{'':10} {'before':>8} {'after':>8} {'change':>8}   95 % interval of the change"]
    for key, label in ROWS.items():
        if key not in summary:
            continue
        means = [summary[key][side]["mean"] for side in ("before", "after", "change")]
        low, high = summary[key]["change"]["interval"]
        lines.append(
            f"{label:10} " + " ".join(f"{m:8.3f}" for m in means) + f"   [{low:.3f}, {high:.3f}]"
        )
    counted = f"{summary['completions']} completions"
    if peak := summary.get("gold_peak"):
        where = f"step {peak['step']} ({peak['mean']:.3f}, KL {peak['kl']:.1f})"
        counted = f"gold was highest at {where}; {counted}"
    lines.append(counted)
    return "\n".join(lines)


def model_card(about: dict[str, Any], summary: dict[str, Any] | None) -> str:
    """README.md of a saved policy, with what its run came to if that is known."""
    config = about["config"]
    algo, reward = (config[k]["_target_"].rsplit(".", 1)[-1] for k in ("algo", "reward"))
    start = (
        config["policy"]["path"]
        or f"a {config['policy']['architecture']['model_type']} built from scratch"
    )
    return f"""---
library_name: {"peft" if config["policy"]["lora"] else "transformers"}
tags: [rlhf_exp, {algo.lower()}]
---

# {algo} on {reward}

Trained by rlhf_exp {about["versions"]["rlhf_exp"]} from {start},
seed {about["seed"]}, run {about["fingerprint"]}.

```
{as_table(summary) if summary else "not evaluated yet: see summary.json of the run"}
```

Proxy is the reward it was trained on, gold the reward it was not. Measured on held-out prompts
with the policy's own sampling.

<details><summary>Settings</summary>

```json
{json.dumps(config, indent=2)}
```

</details>
"""
