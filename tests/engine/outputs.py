"""An output folder as a finished `rac run` leaves it, with invented figures and without weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rac_engine.jobs.journal import Journal
from rac_engine.recipe.files import dump
from rac_engine.recipe.settings import Recipe

MODULES = {
    "self_attn.q_proj": (192, 192),
    "self_attn.k_proj": (96, 192),
    "self_attn.v_proj": (96, 192),
    "self_attn.o_proj": (192, 192),
    "mlp.gate_proj": (512, 192),
    "mlp.up_proj": (512, 192),
    "mlp.down_proj": (192, 512),
}


def metrics_lines(
    sparsity: float = 0.5,
    layers: int = 6,
    description: str = "traces",
    seed: int = 0,
    label: str = "traces",
    **run: Any,
) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl."""
    draw = random.Random(seed)
    lines: list[dict[str, Any]] = [
        {
            "type": "run",
            "versions": {"rac_engine": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
            "machine": {"cpu": "Zen 4", "threads": 2, "memory": 24 << 30, "device": "cpu"},
            "model": {"path": "/models/abacus", "sha256": "a1" * 32, "model_type": "qwen2", "parameters": 2_300_000},
            "calibration": {
                "label": label,
                "description": description,
                "source": "rac/traces",
                "sha256": "b2" * 32,
                "part": "all",
                "sequences": 240,
                "tokens": 49_152,
            },
            "settings": {
                "method": "sparsegpt",
                "sparsity": sparsity,
                "pattern": None,
                "damping": 0.01,
                "block_size": 128,
                "order": "staged",
                "dense": [],
            },
            **run,
        }
    ]
    for layer in range(layers):
        for module, (rows, columns) in MODULES.items():
            zeros = int(sparsity * rows * columns)
            lines.append(
                {
                    "type": "matrix",
                    "layer": layer,
                    "module": module,
                    "name": f"model.layers.{layer}.{module}.weight",
                    "rows": rows,
                    "columns": columns,
                    "zeros": zeros,
                    "sparsity": zeros / (rows * columns),
                    "objective": 12.5,
                    "relative_error": draw.uniform(0.02, 0.08) * (1 + layer / 3) * (2 if "mlp" in module else 1),
                    "damping": 0.01,
                    "tokens": 49_152,
                    "seconds": 0.12,
                    "notes": [],
                }
            )
    phases = {"read": 0.2, "calibrate": 14.1, "factor": 0.9, "sweep": 2.3, "write": 0.4}
    lines.append({"type": "end", "seconds": 18.2, "phases": phases, "peak_memory": 640 << 20, "notes": []})
    return lines


def evaluation(accuracy: float, mean: float, cut_off: float, count: int = 200, seed: int = 0) -> dict[str, Any]:
    """A result of `rac eval` with invented answers."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        cut = draw.random() < cut_off
        rows.append(
            {
                "id": f"p{index}",
                "kind": ("product", "sum", "modular")[index % 3],
                "answer": str(index * 7),
                "predicted": None if cut else str(index * 7),
                "correct": not cut and draw.random() < accuracy / max(1 - cut_off, 1e-9),
                "tokens": 330 if cut else min(329, max(20, round(draw.gauss(mean, 28)))),
                "finish_reason": "length" if cut else "stop",
            }
        )
    tokens = sorted(row["tokens"] for row in rows)
    right = sum(row["correct"] for row in rows) / count
    summary = {
        "problems": count,
        "correct": sum(row["correct"] for row in rows),
        "accuracy": right,
        "ci95": [max(0.0, right - 0.03), min(1.0, right + 0.02)],
        "mean_tokens": sum(tokens) / count,
        "p95_tokens": tokens[int(0.95 * count)],
        "cut_off_share": sum(row["finish_reason"] == "length" for row in rows) / count,
        "seconds": 21.0,
    }
    return {"summary": summary, "rows": rows, "settings": {"max_new_tokens": 330}}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write `lines` as JSONL, making folders as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(out: Path, recipe: Recipe, layers: int = 6) -> Path:
    """Write the `rac` folder of a finished run of `recipe` with invented results."""
    rac = out / "rac"
    write_lines(
        rac / "metrics.jsonl", metrics_lines(layers=layers, description="240 traces of its own, prompt and completion")
    )
    (rac / "recipe.yaml").write_text(dump(recipe))
    (rac / "eval").mkdir()
    (rac / "eval" / "dense.json").write_text(json.dumps(evaluation(0.995, 150, 0.0)))
    (rac / "eval" / "pruned.json").write_text(json.dumps(evaluation(0.975, 152, 0.005, seed=1)))
    figures = [(0.02, 260, 0.9), (0.62, 155, 0.04), (0.8, 150, 0.01)]
    for seed, (variant, (accuracy, mean, cut_off)) in enumerate(zip(recipe.compare, figures, strict=False), 2):
        result = evaluation(accuracy, mean, cut_off, seed=seed)
        (rac / "eval" / f"{variant.name}.json").write_text(json.dumps(result))
        label = variant.name.partition("-")[0]
        lines = metrics_lines(
            variant.settings(recipe.prune).sparsity, description=f"as {variant.name}", seed=seed, label=label
        )
        write_lines(rac / "variants" / variant.name / "metrics.jsonl", lines)
    steps = [("traces", 41.0), ("dense answers", 22.0), ("prune", 18.2), ("pruned answers", 23.0), ("variants", 96.0)]
    journal = Journal(rac / "steps.jsonl")
    journal.append({"recipe": dump(recipe)})
    for name, seconds in steps:
        journal.append({"step": name, "seconds": seconds})
    return out
