"""One model in two processes: the tokens of one process, half its bytes, and so many messages a step."""

import json
import re

import pytest

import ranked
from checkpoints import make_checkpoint, write_json
from model import ModelConfig

N_LAYERS = 2
# All that follows asks the same two processes, so one worker of the tests runs it.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three checkpoints: with biases, with tied embeddings, and with a vocabulary that two ranks cannot share."""
    folder = tmp_path_factory.mktemp("ranks")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    make_checkpoint(folder / "biased", **heads, attention_bias=True, mlp_bias=True)
    make_checkpoint(folder / "tied", **heads, num_hidden_layers=1, tie_word_embeddings=True)
    make_checkpoint(folder / "uneven", **heads, num_hidden_layers=1, vocab_size=321)
    write_json(folder / "shares.json", {"shares": {name: [1.5, 0.5] for name in ("prefixkv", "zipvl")}})
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return ranked.run_cases(folder, with_compiler=False)


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of the two ranks has found."""
    ended = ranked.run_ranks(lambda rank: [ranked.__file__, folder])
    assert [status for status, _, _ in ended] == [0, 0], ended
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_every_method_gives_the_tokens_of_one_process_on_both_ranks(alone, ranks):
    """Policies, scores, compressors, formats, sampling, a ragged batch, one row at a time."""
    assert {name: [rank[name] for rank in ranks] for name in ranked.RUNS} == {
        name: [alone[name]] * 2 for name in ranked.RUNS
    }
    several = {json.dumps(alone[name]) for name in ranked.RUNS}
    assert len(several) > len(ranked.RUNS) / 2  # or nothing was evicted, and any mistake would pass


def test_a_conversation_with_turns_and_a_rewind_is_that_of_one_process(alone, ranks):
    for name in ranked.TALKS:
        assert [rank[f"talk {name}"] for rank in ranks] == [alone[f"talk {name}"]] * 2, name


def test_the_output_head_may_be_tied_or_too_uneven_to_share(alone, ranks):
    for name in ("tied", "uneven"):
        assert [rank[name] for rank in ranks] == [alone[name]] * 2
    assert ranks[0]["messages uneven"]["append"] == {"all_reduce": 2}


def test_a_step_has_two_messages_a_layer_and_one_for_the_logits_and_eviction_has_none(ranks):
    step = {"all_reduce": 2 * N_LAYERS, "all_gather_into_tensor": 1}
    for rank in ranks:
        for name in ("slide", "h2o", "adakv"):
            found = rank[f"messages {name}"]
            assert found["append"] == found["select"] == step
            heads = N_LAYERS if name == "adakv" else 0  # once, in prefill, all heads of a layer compete
            assert found["prefill"] == step | {"all_gather_into_tensor": 1 + heads}


def test_one_process_sends_no_message(alone):
    assert alone["messages h2o"] == {"prefill": {}, "append": {}, "select": {}}


def test_compiled_steps_give_the_same_tokens_with_the_same_messages_and_no_copy(alone, ranks):
    for rank in ranks:
        found = rank["compiled"]
        assert found["compiled"] == found["eager"] == ranks[0]["compiled"]["eager"]
        assert found["messages"] == [[2, 1]]  # of one layer, in one graph
        assert 0 < found["largest"] < found["smallest buffer of the cache"]


REPLICATED = r"embed\.weight|.*norm\.weight|.*(wo|w_down)\.bias"


def test_a_rank_holds_half_of_each_shared_tensor_and_of_all_keys_and_values(alone, ranks):
    for name in ("tied", "biased"):
        whole = alone[f"sizes {name}"]
        for rank in ranks:
            found = rank[f"sizes {name}"]
            assert found["kv"] * 2 == whole["kv"]
            assert found["weights"].keys() == whole["weights"].keys() | {"head.weight"}
            for weight, (numbers, in_memory) in found["weights"].items():
                all_numbers = whole["weights"].get(weight, whole["weights"]["embed.weight"])[0]
                assert numbers * (1 if re.fullmatch(REPLICATED, weight) else 2) == all_numbers, weight
                of_table = name == "tied" and weight == "head.weight"
                assert in_memory == (all_numbers if of_table else numbers), weight


# ---- what cannot be shared out


@pytest.mark.parametrize(
    ("n_ranks", "complaint"),
    [
        (2, "3 KV heads and 1536 channels of the MLP cannot be shared out evenly to 2 ranks: start one of 1, 3"),
        (9, "3 KV heads and 1536 channels of the MLP cannot be shared out evenly to 9 ranks: start one of 1, 3"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_with_the_numbers(n_ranks, complaint):
    smollm2 = ModelConfig(49152, 576, 1536, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        smollm2.for_rank(0, n_ranks)


def test_an_mlp_that_cannot_be_shared_out_is_refused_too():
    config = ModelConfig(320, 32, 50, n_layers=1, n_heads=8, n_kv_heads=4, head_dim=8)
    with pytest.raises(
        ValueError, match="4 KV heads and 50 channels of the MLP cannot .* to 4 ranks: start one of 1, 2"
    ):
        config.for_rank(0, 4)


def test_a_ranks_config_is_its_share():
    llama = ModelConfig(128256, 8192, 28672, n_layers=80, n_heads=64, n_kv_heads=8, head_dim=128)
    own = llama.for_rank(3, 8)
    assert (own.n_heads, own.n_kv_heads, own.intermediate_size) == (8, 1, 3584)
    assert (own.head_rows, own.all_kv_heads, own.rank, own.n_ranks) == (16032, 8, 3, 8)
    assert llama.for_rank(0, 1) == llama
