"""A program: loads exported folders with transformers, without difftrain, and says as JSON what comes of each."""

import json
import sys
from pathlib import Path

sys.modules["difftrain"] = None  # an exported folder stands on its own

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
found = {}
for folder in map(Path, sys.argv[1:]):
    asked = json.loads((folder.parent / f"{folder.name}.json").read_text())
    ids = torch.tensor(asked["ids"])
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    save_file({"logits": logits}, folder.parent / f"{folder.name}.logits")
    answer = found[folder.name] = {"is_training": model.training, "dtype": str(logits.dtype)}
    try:
        model(ids, attention_mask=torch.zeros_like(ids))
    except ValueError as error:
        answer["padding"] = str(error)
    labels = torch.where(ids == model.config.mask_token_id, -100, ids)
    answer["loss"] = model(ids, labels=labels).loss.item()
    model.save_pretrained(folder.parent / f"{folder.name}-again")
    if asked["texts"]:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        answer["ids"] = [tokenizer(text)["input_ids"] for text in asked["texts"]]
        answer["texts"] = [tokenizer.decode(ids) for ids in answer["ids"]]
        answer["mask"] = [tokenizer.mask_token, tokenizer.mask_token_id, len(tokenizer)]
        fill = pipeline("fill-mask", str(folder), trust_remote_code=True)
        text = asked["gap"].replace("_", tokenizer.mask_token)
        answer["gap"] = tokenizer(text)["input_ids"]
        answer["filled"] = [[each["token"], each["score"]] for each in fill(text, top_k=2)]
        try:
            answer["unknown"] = tokenizer("\N{SNOWMAN}")["input_ids"]
        except Exception as error:
            answer["unknown"] = str(error)
print(json.dumps(found))
