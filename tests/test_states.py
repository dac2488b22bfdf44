"""Hidden states: every architecture against the model asked one text at a time, and what is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from torch import Tensor

from rlhf_exp import adapters
from rlhf_exp.probes.states import Reader, States
from rlhf_exp.probes.templates import Contrast, Template, join

SHORT = Template(name="short", question="{{ text }} true ?", answers=("no", "yes"))
LONG = Template(
    name="long",
    question="this is said : {{ text }} . true ?",
    answers=("it is false", "it is true"),
)
FIELDS = [
    {"prompt": "a slow drama about a sailor :", "completion": "the plot was fine ."},
    {"prompt": "a loud comedy about a king :", "completion": "it was not boring . i loved it ."},
    {"prompt": "a short satire :", "completion": "the music is awful ."},
]
PAIRS = [[Contrast(t, fields) for t in (SHORT, LONG)] for fields in FIELDS]


@pytest.fixture(scope="module")
def models(tiny_base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder, an encoder and an encoder-decoder with one tokenizer, weights drawn wide."""
    from transformers import AutoTokenizer, BertConfig, BertModel, T5Config
    from transformers import T5ForConditionalGeneration as T5

    folder = tmp_path_factory.mktemp("models")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_base())
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    bert = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
        **size,
    )
    t5 = T5Config(
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=2,
        decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_factor=2.0,
        **size,
    )
    for name, model in (("encoder", BertModel(bert)), ("encoder-decoder", T5(t5))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"decoder": tiny_base(), "llama": tiny_base("llama")} | {
        name: folder / name for name in ("encoder", "encoder-decoder")
    }


def opened(source: Path, **settings: Any) -> Reader:
    reader = Reader(**settings)
    reader.open(source, "cpu")
    return reader


def alone(reader: Reader, question: str, answer: str) -> tuple[list[Tensor], Tensor]:
    """All hidden states [t, d] by layer of one statement, with the answer's token ids."""
    tokenizer, model = reader.tokenizer, reader.model
    with torch.no_grad():
        if reader.kind == "encoder-decoder" and reader.states == "decoder":
            ids = torch.tensor([tokenizer(question)["input_ids"]])
            target = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
            out = model(input_ids=ids, labels=torch.tensor([target]), output_hidden_states=True)
            return [h[0] for h in out.decoder_hidden_states], out.loss
        ids = torch.tensor([tokenizer(join(question, answer))["input_ids"]])
        part = model.get_encoder() if reader.kind == "encoder-decoder" else model
        out = part(input_ids=ids, output_hidden_states=True)
        return [h[0] for h in out.hidden_states], ids[0]


@pytest.mark.parametrize("token", ["last", "penultimate", "first", "mean"])
@pytest.mark.parametrize(
    ("kind", "states", "layers"),
    [
        ("decoder", "decoder", 3),
        ("llama", "decoder", 3),
        ("encoder", "decoder", 3),
        ("encoder-decoder", "decoder", 4),
        ("encoder-decoder", "encoder", 3),
    ],
)
def test_states_are_those_of_each_statement_alone(
    models, kind: str, states: str, layers: int, token: str
) -> None:
    reader = opened(models[kind], states=states, token=token, token_budget=64)
    hidden, _, cut = reader.read(PAIRS, reader.wanted)
    assert (list(hidden), cut) == (list(range(layers)), 0)
    for i, row in enumerate(PAIRS):
        for j, contrast in enumerate(row):
            question, *answers = contrast.texts()
            for k, answer in enumerate(answers):
                expected = alone(reader, question, answer)[0]
                for layer in range(layers):
                    at = expected[layer]
                    picked = {
                        "last": at[-1],
                        "penultimate": at[-2],
                        "first": at[0],
                        "mean": at.mean(0),
                    }
                    torch.testing.assert_close(
                        hidden[layer][i, j, k], picked[token], atol=2e-5, rtol=1e-4
                    )


def test_an_encoder_decoder_is_read_where_it_has_read_the_answer(models) -> None:
    """Decoder inputs are the labels moved right: the last one is the answer's last token."""
    reader = opened(models["encoder-decoder"])
    (first, second), _ = reader._fitting([PAIRS[0][0]])
    assert first.decoder[-1] == second.decoder[-1] == reader.tokenizer.eos_token_id
    hidden, _, _ = reader.read(PAIRS[:1], [3])
    apart = (hidden[3][..., 1, :] - hidden[3][..., 0, :]).norm(dim=-1)
    assert float(apart.min()) > 0.1


@pytest.mark.parametrize("kind", ["decoder", "llama"])
def test_log_probabilities_are_means_over_the_answer(models, kind: str) -> None:
    reader = opened(models[kind])
    _, lm, _ = reader.read(PAIRS, [0], lm=True)
    assert lm is not None
    for i, row in enumerate(PAIRS):
        for j, contrast in enumerate(row):
            question, *answers = contrast.texts()
            for k, answer in enumerate(answers):
                _, ids = alone(reader, question, answer)
                with torch.no_grad():
                    found = reader.model(input_ids=ids[None]).logits[0].log_softmax(-1)
                told = reader.tokenizer.convert_ids_to_tokens(ids)
                count = 1  # tokens from the back until they hold the answer; "Ġ" is a space
                while len("".join(told[-count:]).removeprefix("Ġ")) < len(answer.replace(" ", "Ġ")):
                    count += 1
                chosen = found[:-1].gather(1, ids[1:, None])[-count:, 0]
                assert float(lm[i, j, k]) == pytest.approx(float(chosen.mean()), abs=1e-4)


def test_log_probabilities_of_an_encoder_decoder_are_its_loss(models) -> None:
    reader = opened(models["encoder-decoder"])
    _, lm, _ = reader.read(PAIRS, [0], lm=True)
    assert lm is not None
    for i, row in enumerate(PAIRS):
        question, *answers = row[1].texts()
        for k, answer in enumerate(answers):
            assert float(lm[i, 1, k]) == pytest.approx(
                -float(alone(reader, question, answer)[1]), abs=1e-4
            )


def test_encoders_have_no_log_probabilities(models) -> None:
    assert opened(models["encoder"]).states_of(PAIRS, [0, 1, 0]).lm is None


def test_end_of_text_is_read_if_asked_for(models) -> None:
    plain, ended = (opened(models["decoder"], end_of_text=x) for x in (False, True))
    assert not torch.allclose(plain.read(PAIRS, [2])[0][2], ended.read(PAIRS, [2])[0][2])
    assert torch.allclose(  # the token before it is the answer's last
        plain.read(PAIRS, [2])[0][2],
        Reader.read(_with(ended, token="penultimate"), PAIRS, [2])[0][2],
        atol=1e-5,
    )


def _with(reader: Reader, **settings: Any) -> Reader:
    for name, value in settings.items():
        setattr(reader, name, value)
    return reader


# ---- the budget


def test_long_passages_lose_their_beginning_and_never_the_answer(models, caplog) -> None:
    """promptsource cuts the text to 2048 characters, which takes the completion to be judged."""
    long = {"prompt": "the plot was fine . " * 300, "completion": "it was awful"}
    assert len(long["prompt"]) > 5000
    reader = opened(models["decoder"], max_length=40)
    rows = [[Contrast(SHORT, long)], [Contrast(SHORT, FIELDS[2])]]
    (no, yes, *short), cut = reader._fitting([row[0] for row in rows])
    assert cut == 1
    texts = [reader.tokenizer.decode(side.ids) for side in (no, yes)]
    assert 33 <= len(no.ids) <= 40
    assert 33 <= len(yes.ids) <= 40
    assert texts[0].endswith("it was awful true ? no")
    assert texts[1].endswith("it was awful true ? yes")
    assert texts[0].removesuffix("no") == texts[1].removesuffix("yes")  # both were cut alike
    assert [s.ids for s in short] == [s.ids for s in reader._fitting([rows[1][0]])[0]]
    found = reader.states_of(rows, [0, 1])
    assert found.about["cut"] == 1
    assert "1 of 2 passages cut to model.max_length=40 tokens" in caplog.text


def test_an_answer_that_does_not_fit_is_an_error(models) -> None:
    reader = opened(models["decoder"], max_length=8)
    with pytest.raises(ValueError, match=r"without its passage, more than .*max_length=8.*raise"):
        reader.read(PAIRS, [0])


def test_the_limit_is_the_models_own(models) -> None:
    assert opened(models["decoder"]).limit == 64
    assert opened(models["decoder"], max_length=10).limit == 10


def test_positions_that_start_after_the_pad(models, tmp_path: Path) -> None:
    """RoBERTa's table has rows that no token reaches."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    tokenizer: Any = AutoTokenizer.from_pretrained(models["decoder"])
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        intermediate_size=16,
        max_position_embeddings=34,
        **shape,
    )
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reader = opened(tmp_path)
    assert reader.limit == 34 - tokenizer.pad_token_id - 1
    long = {"prompt": "the plot was fine . " * 30, "completion": "it was awful"}
    hidden, _, cut = reader.read([[Contrast(SHORT, long)]], [1])
    assert cut == 1
    assert hidden[1].isfinite().all()


def test_the_same_model_is_opened_once(models) -> None:
    reader = opened(models["decoder"])
    model = reader.model
    reader.open(models["decoder"], "cpu")
    assert reader.model is model
    reader.open(models["llama"], "cpu")
    assert reader.model is not model


# ---- storage


def test_states_come_back_as_they_were_saved(models, tmp_path: Path) -> None:
    found = opened(models["decoder"], store="bfloat16").states_of(PAIRS, [0, 1, 1])
    found.save(tmp_path)
    back = States.load(tmp_path)
    assert list(back.hidden) == [0, 1, 2]
    assert back.hidden[1].dtype == torch.bfloat16
    assert all(torch.equal(back.hidden[n], found.hidden[n]) for n in found.hidden)
    assert back.labels.tolist() == [0, 1, 1]
    assert back.about == found.about
    assert len(back.about["weights"]) == 64


def test_overflow_names_the_layer_and_the_dtype(models) -> None:
    reader = opened(models["decoder"], store="float16")
    with torch.no_grad():
        reader.model.get_input_embeddings().weight.mul_(1e7)
    with pytest.raises(ValueError, match=r"layer 0 has .*not finite in float16: .*store=float32"):
        reader.read(PAIRS, [0])


def test_layers_that_the_model_has_not(models) -> None:
    with pytest.raises(ValueError, match=r"layers=\[9\]: the model at .* has layers 0-2"):
        opened(models["decoder"], layers=[1, 9])
    assert opened(models["decoder"], layers=[2, 0]).wanted == [0, 2]


# ---- the policy's own base


def test_a_shared_base_is_read_with_its_adapters_off(models) -> None:
    policy = tiny_policy(lora={"r": 2, "init_lora_weights": False, "fan_in_fan_out": True})
    policy.load(models["decoder"], trainable=True)
    shared, copy = Reader(share=True), opened(models["decoder"])
    shared.open(models["decoder"], "cpu", policy.model)
    assert shared.model is policy.model.get_base_model()
    expected = copy.read(PAIRS, [1, 2])[0]
    for layer, x in shared.read(PAIRS, [1, 2])[0].items():
        torch.testing.assert_close(x, expected[layer])
    assert adapters.fingerprint(shared.model) == adapters.fingerprint(copy.model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():  # and the policy has its adapters again
        assert not torch.allclose(policy.model(ids).logits, copy.model(ids).logits)
