"""The parts of `interop.py` that run in the environments of other tools, one at a time: they read and write JSON.

python benchmarks/peers/interop_peers.py vllm MODEL --given questions.json --found answers.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_process import answer

Given = dict[str, Any]
"""What `interop.py` asks."""


def zeros_of(model: Any, names: list[str]) -> dict[str, int]:
    """Zeros and weights of the named matrices of a torch model."""
    found = dict(model.named_parameters())
    return {
        "zeros": sum(int((found[name] == 0).sum()) for name in names),
        "weights": sum(found[name].numel() for name in names),
    }


def bytes_of(model: Any) -> int:
    """Bytes of the parameters of a torch model."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def vllm(model: Path, given: Given) -> Any:
    """Greedy answers to prompts of token ids, and, if they are asked for, the bytes of the parameters in memory."""
    from vllm import LLM, SamplingParams

    quantization = given.get("quantization")
    engine = LLM(model=str(model), max_model_len=512, max_num_seqs=16, enforce_eager=True, quantization=quantization)
    prompts = [{"prompt_token_ids": ids} for ids in given["prompts"]]
    answers = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=given["tokens"]))
    found: dict[str, Any] = {"answers": [list(answer.outputs[0].token_ids) for answer in answers]}
    if given.get("bytes"):
        from interop_peers import bytes_of  # by this name vLLM's workers find it, and not by that of a script

        found["bytes"] = sum(engine.apply_model(bytes_of))
    return found


TASK = """task: abacus
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{problem}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {tokens}}}
filter_list:
  - name: boxed
    filter: [{{function: regex, regex_pattern: "boxed.([^}}]*)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def lm_eval(model: Path, given: Given) -> Any:
    """Accuracy on problems by lm-eval's own loop, by its `hf` model, with the chat template and greedy."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    work = Path(given["work"])
    (work / "lm-eval-data.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in given["problems"]))
    (work / "lm-eval-task").mkdir(exist_ok=True)
    text = TASK.format(data=work / "lm-eval-data.jsonl", tokens=given["tokens"])
    (work / "lm-eval-task" / "abacus.yaml").write_text(text)
    found = simple_evaluate(
        model="hf",
        model_args=f"pretrained={model},dtype=bfloat16",
        tasks=["abacus"],
        task_manager=TaskManager(include_path=str(work / "lm-eval-task")),
        apply_chat_template=True,
        batch_size=given["batch"],
        device="cpu",
        log_samples=True,
    )
    longest = max(len(sample["resps"][0][0]) for sample in found["samples"]["abacus"])
    return {
        "accuracy": found["results"]["abacus"]["exact_match,boxed"],
        "problems": len(given["problems"]),
        "longest_answer_characters": longest,
    }


LIGHTEVAL_TASK = """from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def prompt(line, task_name=None):
    return Doc(task_name=task_name, query=line["problem"], choices=[line["answer"]], gold_index=0)


TASKS_TABLE = [
    LightevalTaskConfig(
        name="abacus", prompt_function=prompt, hf_repo={data!r}, hf_subset="default", hf_avail_splits=["test"],
        evaluation_splits=["test"], generation_size={tokens}, stop_sequence=[], metrics=[Metrics.exact_match],
    )
]
"""


LIGHTEVAL = """from lighteval.tasks.registry import Registry
Registry._load_from_files = staticmethod(lambda *given: {})
Registry._load_from_subdirs = staticmethod(lambda *given: {})
from lighteval.__main__ import app
app()
"""
"""Its command line without its own tasks, some of which ask the network when they are imported."""


def lighteval(model: Path, given: Given) -> Any:
    """Which files lighteval leaves in the model's folder when it evaluates problems."""
    work = Path(given["work"])
    (work / "lighteval-data").mkdir(exist_ok=True)
    lines = "".join(json.dumps(problem) + "\n" for problem in given["problems"])
    (work / "lighteval-data" / "test.jsonl").write_text(lines)
    task = work / "lighteval_task.py"
    task.write_text(LIGHTEVAL_TASK.format(data=str(work / "lighteval-data"), tokens=given["tokens"]))
    before = {str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()}
    arguments = f"model_name={model},dtype=bfloat16,batch_size={given['batch']}"
    command = ["accelerate", arguments, "abacus", "--custom-tasks", str(task), "--output-dir", str(work / "lighteval")]
    subprocess.run([sys.executable, "-P", "-c", LIGHTEVAL, *command], check=True)
    after = {str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()}
    return {"files": len(after - before)}


def lora(model: Path, given: Given) -> Any:
    """Zeros of a pruned model with a LoRA adapter: while it is trained, and merged; the merged model is saved."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=True))
    optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for ids in given["sequences"]:
        batch = torch.tensor([ids])
        loss = wrapped(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    inner = [f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight" for name in given["matrices"]]
    trained = zeros_of(wrapped, inner)
    merged = wrapped.merge_and_unload()
    after = zeros_of(merged, given["matrices"])
    merged.to(torch.bfloat16).save_pretrained(given["out"])
    AutoTokenizer.from_pretrained(model).save_pretrained(given["out"])
    return {"steps": len(losses), "trained": trained, "merged": after}


def gptq(model: Path, given: Given) -> Any:
    """Zeros of a pruned model after llm-compressor's GPTQ to int4, as the weights stand in memory."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = dict(loaded.named_parameters())
    masks = {name: found[name].detach() == 0 for name in given["matrices"]}
    sequences = given["sequences"]
    weights = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=given["symmetric"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    data = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]})
    oneshot(
        model=loaded,
        dataset=data,
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["re:.*lm_head"]),
        num_calibration_samples=len(sequences),
        max_seq_length=max(map(len, sequences)),
        shuffle_calibration_samples=False,
        batch_size=1,
        pipeline="sequential",
    )
    found = dict(loaded.named_parameters())
    kept = sum(int((found[name].detach()[mask] == 0).sum()) for name, mask in masks.items())
    return {"zeros": sum(int(mask.sum()) for mask in masks.values()), "kept": kept}


TOLD = """import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv.pop(0))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""llama.cpp's converter, told the pre-tokenizer that it looks up by a hash of the token ids of a text."""


def gguf(model: Path, given: Given) -> Any:
    """llama.cpp's converter as it is, and told the pre-tokenizer; then greedy answers of transformers from the file."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    converter, out = Path(given["converter"]), Path(given["out"])
    command = [str(converter / "convert_hf_to_gguf.py"), str(model), "--outfile", str(out), "--outtype", "f32"]
    plain = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    found = {"plain": plain.stderr.strip().splitlines()[-1] if plain.returncode else None}
    subprocess.run([sys.executable, "-c", TOLD, str(converter), *command], check=True)
    loaded = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32)
    answers = []
    for ids in given["prompts"]:
        made = loaded.generate(
            torch.tensor([ids]), max_new_tokens=given["tokens"], do_sample=False, eos_token_id=given["eos"]
        )
        answers.append(made[0, len(ids) :].tolist())
    return found | {
        "tokens": GGUFReader(out).fields["tokenizer.ggml.tokens"].contents(),
        "answers": answers,
        "matrices": zeros_of(loaded, given["matrices"]),
    }


CHECKS: dict[str, Callable[[Path, Given], Any]] = {
    "vllm": vllm,
    "lm-eval": lm_eval,
    "lighteval": lighteval,
    "lora": lora,
    "gptq": gptq,
    "gguf": gguf,
}


if __name__ == "__main__":
    answer(__doc__.splitlines()[0], "check", CHECKS)
