"""GLM-4 as a whole: logits and greedy answers against transformers' GlmForCausalLM, both ways."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM

from common import EXAMPLE, close, differ, export, run, tell, train

SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
# Logits reach about 10; float32 on both sides, summed in other orders.
LIMIT = 5e-5


def make(work: Path) -> tuple[Path, Path, list[list[int]]]:
    """A tiny model, rows to train on, and rows to ask."""
    config = GlmConfig(
        vocab_size=208, hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, partial_rotary_factor=0.5, max_position_embeddings=128,
        rms_norm_eps=1.5625e-07, attention_bias=True, tie_word_embeddings=False, pad_token_id=196,
        eos_token_id=[196, 203, 205], bos_token_id=None, initializer_range=0.2)
    model = GlmForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(work / "model")
    # 201 and 203 are [gMASK] and sop here.
    asked = [[201, 203, *[(i * 31 + j * 17) % 190 for j in range(9 + i)]] for i in range(3)]
    lines = []
    for i in range(8):
        prompt = [201, 203, *[(i * 13 + j * 7) % 190 for j in range(6)]]
        answer = [(i * 11 + j * 3) % 190 for j in range(5)] + [205]
        lines.append(json.dumps({"input_ids": prompt + answer, "labels": [-100] * 8 + answer}))
    rows = work / "rows.jsonl"
    rows.write_text("\n".join(lines))
    (work / "asked.json").write_text(json.dumps(asked))
    return work / "model", rows, asked


def reference(model, asked):
    """Logits of every position, and eight greedy ids."""
    logits, greedy = [], []
    with torch.no_grad():
        for row in asked:
            ids = torch.tensor([row])
            logits.append(model(input_ids=ids).logits[0].float())
            answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                    max_new_tokens=8, eos_token_id=-1, pad_token_id=196)
            greedy.append(answer[0, len(row):])
    return logits, greedy


def of_ours(work: Path, model: Path, adapter: Path | None):
    """The same of mp-train."""
    out = work / "logits.safetensors"
    run(EXAMPLE, "logits", model, adapter or "-", work / "asked.json", out)
    found = load_file(out)
    rows = range(len(found) // 2)
    return [found[f"{i}.logits"] for i in rows], [found[f"{i}.greedy"] for i in rows]


def compare(what: str, found, expected) -> None:
    close(f"GLM-4: {what}, logits", zip(found[0], expected[0]), LIMIT)
    same = sum(torch.equal(a, b) for a, b in zip(found[1], expected[1]))
    tell(f"GLM-4: {what}, greedy answers", f"{same} of {len(expected[1])} equal", "all",
         same == len(expected[1]) > 0)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def check(work: Path) -> None:
    work.mkdir()
    model, rows, asked = make(work)
    base = reference(load(model), asked)
    compare("the base model", of_ours(work, model, None), base)

    # Made by PEFT, loaded here.
    for form, settings in {
        "all six layers": dict(target_modules=SPLIT),
        "root scale, own ranks, two blocks": dict(
            target_modules=["q_proj", "down_proj"], use_rslora=True, layers_to_transform=[1, 3],
            rank_pattern={"mlp.down_proj": 3}, alpha_pattern={"mlp.down_proj": 2}),
    }.items():
        made = get_peft_model(load(model), LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, **settings))
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.15)
        made.eval()
        folder = work / f"peft-{form.replace(' ', '-')}"
        made.save_pretrained(folder)
        expected = reference(made, asked)
        compare(f"LoRA of PEFT ({form})", of_ours(work, model, folder), expected)
        differ(f"GLM-4: what that adapter changes ({form})", expected[0], base[0], 0.1)
        merged = export(model, Path(f"{folder}-merged"), adapter=folder)
        compare(f"LoRA of PEFT ({form}), merged here, AutoModelForCausalLM", reference(load(merged), asked),
                expected)

    # Trained here, loaded by PEFT.
    adapter = train(model, rows, work / "lora", "--r", 8, "--lora-alpha", 16, "--target-modules",
                    ",".join(SPLIT))
    trained = of_ours(work, model, adapter)
    in_peft = reference(PeftModel.from_pretrained(load(model), adapter).eval(), asked)
    compare("LoRA trained here, PeftModel.from_pretrained", in_peft, trained)
    differ("GLM-4: what training changed", trained[0], base[0], 0.1)

    # Trained on from PEFT's adapter: loaded, stepped, and loaded by PEFT again.
    onward = train(model, rows, work / "onward", "--init-adapter", work / "peft-all-six-layers", "--r", 8,
                   "--lora-alpha", 16, "--target-modules", ",".join(SPLIT))
    further = of_ours(work, model, onward)
    compare("LoRA of PEFT trained on here, PeftModel.from_pretrained",
            reference(PeftModel.from_pretrained(load(model), onward).eval(), asked), further)

    # Merged, in several files.
    merged = export(model, work / "merged", "--max-shard-size", "100kB", adapter=adapter)
    files = len(list(merged.glob("model-*.safetensors")))
    compare(f"LoRA trained here, merged into {files} files, AutoModelForCausalLM",
            reference(load(merged), asked), trained)
    halves = export(model, work / "brains", "--dtype", "bfloat16", adapter=adapter)
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in load(merged).state_dict().items()}
    found = AutoModelForCausalLM.from_pretrained(halves, torch_dtype="auto")
    same = [torch.equal(found.state_dict()[name], tensor) for name, tensor in rounded.items()]
    tell("GLM-4: the same in bfloat16, torch_dtype=\"auto\"", f"{found.dtype}, {sum(same)} of {len(same)} equal",
         "torch.bfloat16, all", found.dtype == torch.bfloat16 and all(same))

    # The whole model trained here.
    whole = train(model, rows, work / "whole", "--kind", "full", "--learning-rate", 0.001)
    compare("whole model trained here, AutoModelForCausalLM", reference(load(whole), asked),
            of_ours(work, whole, None))
