"""The actor for Ray: what it answers is what a batch job answers, on one node or two."""

import json

import numpy as np
import pytest
from texts import small_tokenizer
from tiny import tiny_model

from bitjax.batch import Batch, Source, run_batch
from bitjax.cluster import Answer, prompts
from bitjax.config import BatchConfig, EngineConfig
from bitjax.infer import pack_model
from bitjax.model.files import load_model, save_model

SETTINGS = {"max_tokens": 5}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tiny_model(vocab_size=272, num_layers=1, max_seq_len=48)
    made.tokenizer = small_tokenizer()
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, pack_model(made))
    return path


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "in.jsonl"
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    openai = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body}
    values = [f"p{i}" for i in range(16)]
    values += [{"prompt": "q", "id": "x", "n": 2}, openai, "", {"prompt": "a", "no": 1}]
    path.write_text("\n".join(map(json.dumps, values)) + "\n{broken\n")
    return path


@pytest.fixture(scope="module")
def wanted(path, lines, tmp_path_factory):
    """Records of a batch job, by index, made into the actor's rows."""
    out = tmp_path_factory.mktemp("out") / "out.jsonl"
    run_batch(
        Batch(Source(lines), out, BatchConfig(), SETTINGS, EngineConfig(max_sequences=3)),
        load_model(path),
    )
    rows = []
    for index, line in enumerate(out.read_text().splitlines()):
        record = json.loads(line)
        body = record["response"]["body"] if "custom_id" in record else record
        [first, *more] = body.get("choices", [body])
        texts = [c["message"]["content"] if "message" in c else c.get("text", "")
                 for c in (first, *more)]  # fmt: skip
        error = body["error"]["message"] if "error" in body else ""
        name = record.get("custom_id", record.get("id", ""))
        rows.append((index, name, texts[0], error, len(more)))
    return rows


def rows_of(found):
    return [
        (int(index), name, text, error, len(json.loads(choices)) - 1 if choices else 0)
        for index, name, text, error, choices in zip(
            *(found[n] for n in ("index", "id", "text", "error", "choices")), strict=True
        )
    ]


def test_the_actor_answers_as_a_batch_job(path, lines, wanted):
    actor = Answer(path, SETTINGS, engine=EngineConfig(max_sequences=2))
    found = [*Source(lines).read()]
    batch = {
        "index": np.array([line.index for line in found]),
        "line": [json.dumps(line.value) for line in found],
        "error": [line.error for line in found],
    }
    made = actor(batch)
    got = rows_of(made)
    assert got == wanted
    assert got[-1][3].startswith("not JSON: Expecting property name")
    assert made["prompt_tokens"][0] == 2
    assert made["completion_tokens"][0] == 5
    assert {made["finish_reason"][0], made["finish_reason"][-1]} == {"length", ""}
    backwards = {name: list(column)[::-1] for name, column in batch.items()}
    assert rows_of(actor(backwards)) == got[::-1]  # ids again: not those of earlier lines
    # As columns of fields, as Arrow gives them.
    columns = {
        "index": np.array([0, 16, 30]),
        "prompt": np.array(["p0", "q", None], object),
        "n": np.array([np.nan, 2.0, np.nan]),
        "messages": np.array([None, None, np.array([{"role": "user", "content": "a"}])], object),
        "id": np.array([None, "x", None], object),
    }
    some = rows_of(actor(columns))
    assert some[:2] == [wanted[0], wanted[16]]
    assert some[2][3] == ""
    bad = {"index": [0, 1, 2], "line": ["[" * 100_000, "[1]", '{"temperature": NaN}']}
    assert [error for *_, error, _ in rows_of(actor(bad))] == [
        "not JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode "
        "string", "neither a text nor an object: [1]", "not JSON: NaN is no JSON",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="the rows have no 'index'; their columns are prompt"):
        actor({"prompt": ["a"]})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_nodes(path, lines, wanted, monkeypatch):
    monkeypatch.chdir(path.parent)  # workers import from where the driver stands
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 would wait for whatever else there is
    ray = pytest.importorskip("ray", reason="ray is not installed; the extra 'cluster' has it")
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "resources": {"node": 1}, "object_store_memory": 100 << 20},
    )
    try:
        cluster.add_node(num_cpus=2, resources={"node": 1}, object_store_memory=100 << 20)
        ray.init(address=cluster.address, log_to_driver=False)
        assert sum(node["Alive"] for node in ray.nodes()) == 2
        # Else the actor that is there first may have done all before the other.
        ray.data.DataContext.get_current().wait_for_min_actors_s = 120

        class Where(Answer):
            """Tells on which node it ran."""

            def __call__(self, batch):
                node = ray.get_runtime_context().get_node_id()
                return super().__call__(batch) | {"node": [node] * len(batch["index"])}

        found = (
            prompts(lines)
            .repartition(10)
            .map_batches(
                Where,
                fn_constructor_kwargs={
                    "path": str(path), "settings": SETTINGS,
                    "engine": EngineConfig(max_sequences=2),
                },
                batch_size=2,
                num_cpus=1,  # one is left for Ray's own tasks, without which nothing is read
                resources={"node": 1},  # an actor on each
                compute=ray.data.ActorPoolStrategy(size=2),
            )
            .sort("index")
            .take_all()
        )  # fmt: skip
        columns = {name: [row[name] for row in found] for name in found[0]}
        assert rows_of(columns) == wanted
        assert len({*columns["node"]}) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()
