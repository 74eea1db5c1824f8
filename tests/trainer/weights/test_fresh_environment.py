"""A model that a manifest trained is opened by Transformers where this project is not, and answers the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.generate import Decoder, Request, Sampling
from internlm_trainer.weights.export import export_llama
from internlm_trainer.weights.load import load_model
from internlm_trainer.weights.recognise import open_weights
from trainer.loop.jobs import Corpus, TinyJob

TEXT, LENGTH = "def parse(", 24
# Whatever environment this is, nothing of the project can be imported in it.
STRANGER = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("internlm_trainer", "internlm_operator"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
try:
    import internlm_trainer
except ImportError:
    pass
else:
    sys.exit("the project is here")
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (kind.from_pretrained(sys.argv[1]) for kind in (AutoTokenizer, AutoModelForCausalLM))
asked = tokenizer(sys.argv[2], return_tensors="pt")
made = model.generate(**asked, max_new_tokens=int(sys.argv[3]), do_sample=False)[0].tolist()
assert not any(name.startswith("internlm_") for name in sys.modules)
print(json.dumps([asked.input_ids[0].tolist(), made[asked.input_ids.shape[1] :]]))
"""


def test_a_trained_model_answers_the_same_where_this_project_is_not_installed(tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text(Path(json.__file__).with_name("decoder.py").read_text() * 3)
    corpus = Corpus(tmp_path / "tokenizer.model", tmp_path / "train", tmp_path / "validation")
    job = TinyJob(corpus, tmp_path / "job", processes=1, zero=(1, 1, 1))
    job.data = {"prepare": {"text": [str(text)], "sample": "line", "validationPercent": 4}}
    run = job.internlm_run()
    assert run.end() == 0, run.log
    weights = open_weights(str(job.checkpoints), "SOURCE")
    words = Tokenizer(corpus.tokenizer.read_bytes())
    export_llama(weights, str(tmp_path / "out"), "fp32", words, 64)

    prompt = [words.bos, *words.encode(TEXT)]
    decoder = Decoder(load_model(weights, torch.device("cpu"), torch.float32), 64)
    [ours] = decoder.generate([Request(prompt, frozenset(), LENGTH, Sampling(temperature=0))])
    command = [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "out"), TEXT, str(LENGTH)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked, theirs = json.loads(done.stdout.splitlines()[-1])
    assert asked == prompt
    assert theirs == ours[: len(theirs)]  # which end at a word that ends answers
    assert len(theirs) > 4
