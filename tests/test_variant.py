"""The variants in examples/: they train, and differ from the default in one thing alone."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data_utils
import main
from data_utils import Loader
from xlnet import BLOCKED

sys.path.insert(0, str(Path(main.__file__).parent / "examples"))
from attention_bias import Alibi
from variant import ReadingOrderLoader

SMALL = "--seq_len 64 --reuse_len 32 --perm_size 16 --num_predict 12 --mem_len 48 --n_layer 2 --device cpu".split()
SETTINGS = ["", "--bi_data True --batch_size 4 --rows 8 --seed 1", "--num_predict 64"]  # backward rows; all predicted


@pytest.mark.parametrize("flags", SETTINGS)
def test_only_the_ranks_differ(flags):
    """Tokens, targets and segments are those of the default loader; given tokens keep their rank."""
    argv = [*SMALL, *flags.split()]
    ours, default = main.prepare(argv, ReadingOrderLoader).loader, main.prepare(argv).loader
    assert type(default) is Loader and ours.pass_len == default.pass_len
    for step in (0, 3, ours.pass_len + 1):
        batch, expected = ours.batch(step), default.batch(step)
        assert not torch.equal(batch["rank"], expected["rank"])
        is_given = (expected["rank"] == -1) | (expected["rank"] == 32)
        assert torch.equal(batch.pop("rank")[is_given], expected.pop("rank")[is_given])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.parametrize("flags", SETTINGS)
def test_ranks_follow_the_text(flags):
    """Targets, SEP and CLS see the given tokens of their part, all of inp from the rest, and their kind before them."""
    run = main.prepare([*SMALL, *flags.split()], ReadingOrderLoader)
    i, j = np.indices((64, 64))  # who looks, and at which position
    first_is_target = []
    for step in range(60):
        batch = run.loader.batch(step)
        for b in range(batch["rank"].size(1)):
            ids, is_target, rank = (batch[name][:, b].numpy() for name in ("inp_k", "inp_q", "rank"))
            in_order = (is_target > 0) | np.isin(ids, [run.vocab.sep_id, run.vocab.cls_id])
            assert in_order[:32].any() and in_order[32:].sum() > 3
            in_part = ~in_order[j] | (in_order[i] & (j < i)) | ((i == j) & (is_target[i] == 0))
            sees = np.where((i < 32) == (j < 32), in_part, j < 32)
            assert np.array_equal(data_utils.ranks_to_mask(rank, is_target) == 0, sees)
            first_is_target.append(is_target[32])
    assert any(first_is_target)  # the first one of the rest comes after all that is given there


@pytest.mark.slow
def test_it_trains(capsys, tmp_path):
    """With the flags of main.py: the loss falls from guessing blindly, 10.3; only the same program goes on with it."""
    argv = [*SMALL, "--output_dir", str(tmp_path)]
    main.main([*argv, "--train_steps", "20"], ReadingOrderLoader)
    main.main([*argv, "--train_steps", "80", "--resume"], ReadingOrderLoader)
    with pytest.raises(SystemExit) as end:
        main.main(["--output_dir", str(tmp_path), "--train_steps", "90", "--resume"])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and err.count("\n") == 1
    assert "the run used ReadingOrderLoader and XLNet, and this program uses Loader and XLNet" in err
    losses = [float(loss) for loss in re.findall(r"Step cost = (\S+)", out)]
    assert len(losses) == 80
    assert np.mean(losses[:4]) > 9.5 and np.mean(losses[-20:]) < 7


# ---------------------------------------------------------------- attention_bias.py


def attention_masks(model, batches):
    """Return what the model adds to the scores of the last batch: for inp, for the rest and for the query stream."""
    masks, mems = [], None
    model.layer[0].register_forward_pre_hook(lambda layer, args: masks.extend(b.attn_mask for b in args[3].blocks))
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("target", "target_mask")}
        _, mems = model(**inputs, mems=mems)
    return masks[-3:]


def test_the_bias_is_slope_times_distance():
    """For each head, query and key, memory included; what is hidden stays hidden."""
    run = main.prepare([*SMALL, "--n_head", "2"], model_class=Alibi)
    plain = main.prepare([*SMALL, "--n_head", "2"]).model
    batches = [run.loader.batch(0), run.loader.batch(1)]
    slots = batches[1]["target_mapping"][:, 0].clamp(min=0).tolist()
    in_window = [range(32), range(32, 64), slots]  # the positions of the queries
    biased, masks = attention_masks(run.model, batches), attention_masks(plain, batches)
    assert [mask.size(3) for mask in masks] == [64, 96, 96]  # 32 of memory
    for positions, with_bias, without in zip(in_window, biased, masks, strict=True):
        for head, slope in enumerate((2**-4, 2**-8)):
            for i, j in np.ndindex(*without.shape[2:]):
                expected = without[0, 0, i, j] - slope * abs(32 + positions[i] - j)
                assert with_bias[0, head, i, j] == expected
    assert (biased[0][:, :1][masks[0] == BLOCKED] == BLOCKED).all()


@pytest.mark.slow
def test_the_biased_model_trains(capsys):
    """With the flags of main.py: the loss falls from guessing blindly, 10.3."""
    main.main([*SMALL, "--train_steps", "80"], model_class=Alibi)
    losses = [float(loss) for loss in re.findall(r"Step cost = (\S+)", capsys.readouterr().out)]
    assert np.mean(losses[:4]) > 9.5 and np.mean(losses[-20:]) < 7
