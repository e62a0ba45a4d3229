"""A fresh process for `test_zoo.py`: load each folder with transformers alone, and save the logits of the given ids."""

import sys
import traceback

import torch
from transformers import AutoModelForCausalLM, logging


def main(file: str) -> None:
    """The file has {"ids": (1, S), "folders": names}; beside it `FILE.out` gets the logits (S, V) or the error of each."""
    logging.set_verbosity_error()
    given, out = torch.load(file), {}
    for folder in given["folders"]:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            with torch.no_grad():
                out[folder] = model(input_ids=given["ids"], use_cache=False).logits[0]
        except Exception:
            out[folder] = traceback.format_exc(limit=-2)
    torch.save(out, f"{file}.out")


if __name__ == "__main__":
    main(sys.argv[1])
