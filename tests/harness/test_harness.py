"""lm-evaluation-harness on our models: its own tasks, item by item what it says of transformers'.

Log-likelihoods are sums of up to 60 logarithms of softmax in float32, in two programs whose logits
differ by 5e-5 of their size (tests/interop/test_transformers_parity.py), here about 5: 60 * 2.5e-4.
"""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from texts import small_tokenizer
from tiny import tiny_model

pytest.importorskip("lm_eval", reason="the extra harness has lm_eval")
pytest.importorskip("torch", reason="the extra parity has torch")
pytest.importorskip("transformers", reason="the extra parity has transformers")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what the harness imports
    import transformers_models as theirs
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

from bitjax.evaluate.requests import RequestScorer
from bitjax.evaluate.rolling import score_documents
from bitjax.harness import HarnessModel
from bitjax.infer.convert import pack_model
from bitjax.interop.tokenizers import write_huggingface_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # they are the harness's and its libraries'
TOLERANCE = 1.5e-2
WORDS = ["hello", "world", "held", "in", "lord", "wor", "é", "hill", "two", "or", "<|im_end|>"]
DATA = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXT = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
ANSWER = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["lo", "\\n"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def documents():
    draw = np.random.default_rng(0)

    def words(count):
        return " ".join(draw.choice(WORDS, count))

    made = [
        {"question": words(draw.integers(1, 4)), "choices": [words(n) for n in (1, 2, 1)],
         "gold": int(draw.integers(3)), "text": words(n)}
        for n in (1, 4, 40, 90, 7, 2)
    ]  # fmt: skip
    made[0]["question"] = ""
    made[1]["question"] += "  "  # its spaces belong to the continuation
    made[2]["question"] = "q" * 80  # longer than the context: its beginning is cut off
    made[3]["choices"] = ["hello", " hello", "hello world"]
    return made


@pytest.fixture(scope="module", params=[False, True], ids=["", "bos"])
def both(request, tmp_path_factory):
    """Our model and theirs of one folder; with and without a token that begins every text."""
    folder = tmp_path_factory.mktemp("llama")
    settings = {"vocab_size": 272, "tie_word_embeddings": True, "num_hidden_layers": 1}
    theirs.save(folder, theirs.Variant("llama", settings))
    write_huggingface_tokenizer(folder, small_tokenizer(add_bos=request.param))
    other = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    return get_model("bitjax")(path=str(folder), max_length=64), other


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The harness's tasks in a folder of YAML files over a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "items.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in documents()))
    for name, form in (("choice", CHOICE), ("text", TEXT), ("answer", ANSWER)):
        data = DATA.format(name=name, file=file, cache=folder / "cache")
        (folder / f"{name}.yaml").write_text(data + form)
    return TaskManager(include_path=str(folder), include_defaults=False)


def test_tasks_item_by_item(both, tasks):
    found, wanted = (
        simple_evaluate(
            model=model,
            tasks=["choice", "text", "answer"],
            task_manager=tasks,
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        for model in both
    )
    ours, other = ([s["resps"] for s in r["samples"]["choice"]] for r in (found, wanted))
    assert len(ours) == len(other) == 6
    for mine, yours in zip(ours, other, strict=True):
        mine, yours = ([pair for ((pair),) in resps] for resps in (mine, yours))
        np.testing.assert_allclose(*([p for p, _ in pairs] for pairs in (mine, yours)),
                                   atol=TOLERANCE)  # fmt: skip
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in yours]
    ours, other = ([s["resps"][0][0] for s in r["samples"]["text"]] for r in (found, wanted))
    np.testing.assert_allclose(ours, other, atol=TOLERANCE)
    # Of an empty context theirs is nothing but padding.
    ours, other = ([s["resps"][0][0] for s in r["samples"]["answer"]][1:] for r in (found, wanted))
    assert ours == other
    assert any(len(text) > 4 for text in ours)
    for task in ("choice", "text"):
        for metric, value in wanted["results"][task].items():
            if isinstance(value, float):
                assert found["results"][task][metric] == pytest.approx(value, rel=1e-3), metric


def instances(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


def test_rolling_is_documents(both):
    """The same as `bitjax eval --documents`, but for a token that begins every text: the harness
    scores it too, after itself. And it takes names of control tokens for them."""
    model, _ = both
    tokenizer = model.text_tokenizer
    texts = [d["text"].replace("<|im_end|>", "end") for d in documents()]
    _, each = score_documents(RequestScorer(model.model), tokenizer, texts)
    found = model.loglikelihood_rolling(instances(*((text,) for text in texts)), disable_tqdm=True)
    if tokenizer.special.add_bos:
        assert np.all(np.array(found) < np.array(each) - 0.1)
    else:
        assert found == pytest.approx(each, abs=TOLERANCE)


def test_generation(both):
    """Greedy tokens are what loglikelihood calls so, another last one is not; samples differ."""
    model, _ = both
    context = model.tok_encode("hello world")
    greedy, sampled = {"max_gen_toks": 9}, {"max_gen_toks": 9, "do_sample": True, "temperature": 1}
    wanted = instances(*(("hello world", s) for s in (greedy, sampled, sampled, greedy)))
    texts = model.generate_until(wanted, True)
    assert texts[0] == texts[3]
    assert len({*texts}) == 3  # each sample of an item is another
    assert texts == model.generate_until(wanted, True)
    params = [model._sampling(i.args[1], n) for n, i in enumerate(wanted)]
    steps = list(model._generator.tokens([context] * 4, params))
    tokens = [int(step[0]) for step in steps]
    for last, best in ((tokens[-1], True), ((tokens[-1] + 1) % 272, False)):
        requests = [(("", ""), context, [*tokens[:-1], last])]
        ((_, found),) = model._loglikelihood_tokens(requests, True)
        assert found == best


def test_settings(both):
    model, _ = both
    params = model._sampling({"until": "a", "temperature": 0.5, "top_p": 0.9, "num_beams": 1}, 2)
    assert (params.temperature, params.top_p, params.stop, params.seed) == (0.5, 0.9, ("a",), 2)
    assert params.max_new_tokens == 256
    assert model._sampling({"do_sample": False, "temperature": 0.5, "top_k": 3}, 0).temperature == 0


def test_chat_templates(both):
    model, other = both
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world "}]
    for history, answer in ((messages[:1], True), (messages, False)):
        text = model.apply_chat_template(history, add_generation_prompt=answer)
        assert text == other.apply_chat_template(history, add_generation_prompt=answer)
        assert model.tok_encode(text) == other.tok_encode(text)
    assert model.chat_template(True) == other.chat_template(True)
    assert model.chat_template(False) is None
    assert model.tokenizer_name.startswith("bitjax-")
    assert model.tok_encode("<|begin|>hello") == other.tok_encode("<|begin|>hello")


def test_partial_results_are_cached(both):
    model, kept = HarnessModel(both[0].model), {}
    model.set_cache_hook(SimpleNamespace(add_partial=lambda *entry: kept.update({entry[:2]: 1})))
    model.loglikelihood_rolling(instances(("hello",)), True)
    model._loglikelihood_tokens([(("a", "b"), [1], [2])], True)
    assert list(kept) == [("loglikelihood_rolling", ("hello",)), ("loglikelihood", ("a", "b"))]


def test_byte_models_and_errors():
    model = HarnessModel(tiny_model(num_layers=1), batch_size="4")
    assert model.batch_size == 4
    assert (model.prefix_token_id, model.eot_token_id, model.tokenizer_name) == (10, 10, "bytes")
    assert model.tok_encode("é") == [0xC3, 0xA9]
    info = model.get_model_info()
    assert info["model_bytes"] == 4 * info["model_num_parameters"]
    packed = HarnessModel(pack_model(tiny_model(num_layers=1))).get_model_info()
    assert packed["model_num_parameters"] == info["model_num_parameters"]  # not their bytes
    assert packed["model_bytes"] < info["model_bytes"]
    for settings, message in (
        ({"num_beams": 4}, "generates with num_beams=4, which bitjax has not"),
        ({"max_gen_toks": 48}, "48 tokens to generate leave no room in the model's context of 48"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate_until(instances(("a", settings)), True)
    with pytest.raises(ValueError, match="a continuation has 49 tokens; it can have 1 to 48"):
        model.loglikelihood(instances(("a", "b" * 49)), True)
    with pytest.raises(ValueError, match="this model's are bytes"):
        model.apply_chat_template([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match=r"max_length=99 is not in 2\.\.48"):
        HarnessModel(model.model, max_length=99)
    with pytest.raises(ValueError, match="batch_size=-1 is below 1"):
        HarnessModel(model.model, batch_size=-1)
