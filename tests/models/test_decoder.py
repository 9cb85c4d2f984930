"""Decoder against transformers' own models with the same weights: logits, losses, gradients, caches."""

from __future__ import annotations

import pytest
import torch
from decoder_families import FAMILIES, ROPES, configuration, gradients_on_disk, on_disk, pair
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, DynamicCache

from kenotron.models import Decoder
from kenotron.models.decoder import document_lengths


def tokens(*shape: int, vocabulary: int = 96) -> torch.Tensor:
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family):
    theirs, ours = pair(configuration(family))
    ids = tokens(2, 20)
    expected, found = theirs(ids, use_cache=False), ours(ids)
    assert (expected.logits - found.logits).abs().max() <= 1e-5
    loss = theirs(ids, labels=ids).loss
    loss.backward()
    mine = ours(ids, labels=ids)
    mine.loss.backward()
    torch.testing.assert_close(mine.loss, loss, rtol=1e-6, atol=1e-6)
    assert mine.logits is None
    grads = gradients_on_disk(ours)
    for param in theirs.parameters():  # what a directory holds, of the gradients
        param.data = param.grad
    expected_grads = on_disk(theirs)
    rounding = 1e-7 * max(grad.norm() for grad in expected_grads.values())  # of gradients that should be zero
    for name, grad in expected_grads.items():
        assert (grads[name].view_as(grad) - grad).norm() <= 1e-5 * grad.norm() + rounding, name


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("length", [12, 80])
def test_every_rotary_scaling_is_that_of_transformers(rope, length):
    theirs, ours = pair(configuration("llama", rope_parameters=ROPES[rope]))
    ids = tokens(1, length)
    assert (theirs(ids).logits - ours(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral, window", "qwen2, some windows", "smollm3, windows", "qwen3_moe"])
def test_padding_and_packed_documents_are_seen_as_by_transformers(family):
    theirs, ours = pair(configuration(family))
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    expected, found = theirs(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits
    assert (expected - found)[mask.bool()].abs().max() <= 1e-5
    positions = torch.cat([torch.arange(7), torch.arange(13)]).expand(2, -1)
    packed = ours.eval()(ids, position_ids=positions).logits
    assert (theirs(ids, position_ids=positions, use_cache=False).logits - packed).abs().max() <= 1e-5
    alone = torch.cat([ours(ids[:, :7]).logits, ours(ids[:, 7:]).logits], 1)
    assert (packed - alone).abs().max() <= 1e-5


def test_documents_stay_apart_beside_a_mask_of_padding():
    _, ours = pair(configuration("llama"))
    ids = tokens(2, 20)
    positions = torch.cat([torch.arange(7), torch.arange(13)]).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    packed = ours(ids, position_ids=positions).logits
    masked = ours(ids, position_ids=positions, attention_mask=mask).logits
    assert (packed - masked)[mask.bool()].abs().max() <= 1e-6


def test_flash_kernels_are_told_where_documents_begin():
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])
    lengths = document_lengths(documents, None)
    assert lengths["cu_seq_lens_q"].tolist() == [0, 2, 5, 6, 9, 10]
    assert lengths["cu_seq_lens_k"].dtype == torch.int32
    assert lengths["max_length_q"] == lengths["max_length_k"] == 3
    with pytest.raises(ValueError, match="padding or packed documents, not both"):
        document_lengths(documents, torch.ones(2, 5))


def test_a_cache_that_is_given_is_given_back():
    _, ours = pair(configuration("llama"))
    ids = tokens(1, 9)
    whole = ours.eval()(ids).logits
    cache = ours(
        ids[:, :4], position_ids=torch.arange(4)[None], past_key_values=DynamicCache(config=ours.config)
    ).past_key_values
    rest = ours(ids[:, 4:], position_ids=torch.arange(4, 9)[None], past_key_values=cache)
    assert rest.past_key_values is cache
    assert (rest.logits - whole[:, 4:]).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_keeps_its_frequencies_and_is_as_exact_as_transformers(dtype):
    theirs, ours = pair(configuration("qwen3, biases, some windows"))
    ids = tokens(2, 20)
    exact, frequencies = theirs(ids).logits, ours.model.rotary_emb.inv_freq.clone()
    theirs.to(dtype)
    theirs.model.rotary_emb.inv_freq = frequencies
    ours.to(dtype)
    assert torch.equal(ours.model.rotary_emb.inv_freq, frequencies)
    errors = [(model(ids).logits.float() - exact).norm() for model in (ours, theirs)]
    assert errors[0] <= 1.2 * errors[1]


def test_under_autocast_it_is_as_exact_as_transformers():
    theirs, ours = pair(configuration("qwen3_moe"))
    ids = tokens(2, 20)
    exact = theirs(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(model(ids).logits.float() - exact).norm() for model in (ours, theirs)]
        loss = ours(ids, labels=ids).loss
    loss.backward()
    assert errors[0] <= 1.2 * errors[1]
    assert all(param.grad.dtype == torch.float32 for param in ours.parameters())


@pytest.mark.parametrize("family", ["llama, biases, tied", "qwen2, some windows", "mixtral, window", "olmo2", "smollm3"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_that_of_transformers(family, use_cache):
    theirs, ours = (model.eval() for model in pair(configuration(family)))
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "pad_token_id": 0, "use_cache": use_cache}
    assert torch.equal(theirs.generate(ids, **settings), ours.generate(ids, **settings))


def test_the_loss_takes_what_trainers_hand_over():
    theirs, ours = pair(configuration("llama"))
    ids = tokens(2, 12)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    logits = ours(ids).logits
    assert ours(ids, labels=labels).loss.item() == pytest.approx(theirs(ids, labels=labels).loss.item(), rel=1e-6)
    count = theirs(ids, labels=labels, num_items_in_batch=7).loss.item()
    assert ours(ids, labels=labels, num_items_in_batch=7).loss.item() == pytest.approx(count, rel=1e-6)
    shifted = cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert ours(ids, shift_labels=labels).loss.item() == pytest.approx(shifted.item(), rel=1e-6)
    both = ours(ids, labels=labels, return_logits=True)
    torch.testing.assert_close(both.logits, logits)
    assert ours(ids, labels=torch.full_like(ids, -100)).loss.item() == 0.0


def test_z_loss_is_the_square_of_the_log_sum_exp():
    config = configuration("llama")
    _, plain = pair(config)
    _, with_z = pair(config, z_loss=0.01)
    ids = tokens(2, 12)
    z = plain(ids).logits[:, :-1].logsumexp(-1).square().mean()
    assert with_z(ids, labels=ids).loss.item() == pytest.approx((plain(ids, labels=ids).loss + 0.01 * z).item(), rel=1e-6)


def test_recompute_changes_no_gradient():
    _, ours = pair(configuration("qwen3_moe"))
    _, again = pair(configuration("qwen3_moe"))
    again.gradient_checkpointing_enable()
    ids = tokens(2, 12)
    for model in (ours, again):
        model.train()(ids, labels=ids).loss.backward()
    for a, b in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_compiled_layers_compute_the_same():
    theirs, ours = pair(configuration("qwen3", num_hidden_layers=1))
    ids = tokens(2, 12)
    for layer in ours.model.layers:
        layer.compile(backend="aot_eager")
    loss = ours(ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(theirs(ids, labels=ids).loss.item(), rel=1e-5)


def test_hidden_states_and_logits_of_some_positions_can_be_had():
    theirs, ours = pair(configuration("llama"))
    ids = tokens(2, 12)
    expected = theirs(ids, output_hidden_states=True).hidden_states
    for a, b in zip(ours(ids, output_hidden_states=True).hidden_states, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert ours(ids, logits_to_keep=2).logits.shape == (2, 2, 96)


def test_initial_weights_are_drawn_as_transformers_draws_them():
    ours = Decoder(configuration("qwen3_moe, some dense, renormalised", hidden_size=64, vocab_size=512))
    for name, param in ours.named_parameters():
        if name.endswith("bias"):
            assert not param.any(), name
        elif "norm" in name:
            assert (param == 1).all(), name
        else:
            assert param.std().item() == pytest.approx(0.1, rel=0.2), name


def test_what_is_not_covered_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model_type='gpt2' is not covered.*llama.*can be trained unmodified"):
        Decoder(AutoConfig.for_model("gpt2"))
    with pytest.raises(ValueError, match=r"router_jitter_noise=0\.1"):
        Decoder(configuration("mixtral", router_jitter_noise=0.1))
    with pytest.raises(ValueError, match=r"attention='flash' is unknown.*'sdpa'"):
        Decoder(configuration("llama"), attention="flash")
    with pytest.raises(ValueError, match="z_loss=-1"):
        Decoder(configuration("llama"), z_loss=-1.0)
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5"):
        Decoder(configuration("llama", rope_parameters=rope))
    model = Decoder(configuration("llama"))
    for call, hint in [
        (lambda: model(tokens(1, 4), output_attentions=True), "output_attentions=True"),
        (lambda: model(tokens(1, 4), return_dict=False), "return_dict=False"),
        (lambda: model.save_pretrained("x"), r"kenotron\.hf\.export"),
        (lambda: Decoder.from_pretrained("x"), "from_hf"),
        (lambda: model.resize_token_embeddings(7), "vocab_size"),
    ]:
        with pytest.raises(ValueError, match=hint):
            call()
    with pytest.raises(ValueError, match="activation='tanh' is not known"):
        Decoder(configuration("llama", hidden_act="tanh"))
    with pytest.raises(ValueError, match=r"num_attention_heads=4 with num_key_value_heads=3"):
        Decoder(configuration("llama", num_key_value_heads=3))
