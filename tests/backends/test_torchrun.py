"""Real launches: `torchrun --nproc-per-node 2 -m oldlogits train ...` against one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from oldlogits.run.run import run
from oldlogits.train.checkpoint import of_kind, read_state

from ..runs import check_accounting, events_of, recipe, summary_of, wait_for_updates, write_recipe
from ..waiting import HUNG_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
BF16 = {"model": {"forward_dtype": "bf16"}, "trainer": {"lr": 1e-5}}
CASES = {
    "fp32": {},
    "bf16": {**BF16, "trainer": {"lr": 1e-3, "activation_checkpointing": True}},
    "int8 engine": {"engine": {"precision": "int8"}, "trainer": {"layout": "padded"}},
    "ewma": {"variant": "ppo_ewma_train_infer", "proximal": {"source": "ewma", "decay": "mean-lag"}},
    "ewma that follows audits": {
        "variant": "ppo_ewma_train_infer",
        "proximal": {"source": "ewma", "decay": "audited", "reset": "audited"},
        "audit": {"share": 1.0},
    },
    "adapters": {"model": {"lora_rank": 4}, "engine": {"precision": "int8"}},
    "adapters, bf16": {"model": {"lora_rank": 4, "forward_dtype": "bf16"}, "trainer": {"activation_checkpointing": True}},
    "moments on the host": {"trainer": {"offload_optimizer": True}},
    "measured band": {"band": "auto", "engine": {"precision": "int8"}},
    "terms": {
        "objective": {
            "kl_coefficient": 0.05,
            "kl_reference_every": 2,
            "entropy_bonus": 0.02,
            "advantage": "token-normalised",
            "clip_by_lag": "inverse",
        },
        "trainer": {"lr": 3e-3, "warmup_steps": 0, "lr_by_staleness": "inverse", "activation_checkpointing": True},
    },
    "reference in the reward": {
        "objective": {"kl_coefficient": 0.5, "kl_in": "reward"},
        "engine": {"precision": "int8"},
        "trainer": {"lr": 3e-3},
    },
    "token-mean-kept": {"objective": {"loss_aggregation": "token-mean-kept"}, "band": 1.2},
}


def launch(*arguments):
    """`oldlogits train` with these arguments, over two ranks."""
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "oldlogits", "train"]
    return subprocess.Popen(
        [sys.executable, *words, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    """Its exit status and what it said; no process of it stays behind."""
    try:
        said, _ = process.communicate(timeout=HUNG_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


def table_of(out, version):
    return pq.read_table(out / f"tokens/v{version:06d}.parquet").to_pydict()


def state_of(out):
    [*_, latest] = sorted((out / "checkpoints").iterdir())
    return read_state(latest / "state")


def gap(left, right, name):
    return float(np.abs(np.array(left[name]) - np.array(right[name])).max())


def largest_difference(left, right, kind):
    left, right = of_kind(kind, left), of_kind(kind, right)
    assert left.keys() == right.keys() != set()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_losses_the_old_logits_and_the_weights_of_one_process(tiny_folder, tmp_path, case):
    config = recipe(tiny_folder, num_updates=3, **CASES[case])
    assert run(config, tmp_path / "one").error is None
    status, said = finish(launch(write_recipe(tmp_path / "r.toml", config), "--out", tmp_path / "two"))
    assert status == 0, said
    one, two = table_of(tmp_path / "one", 1), table_of(tmp_path / "two", 1)
    assert one["token_id"] == two["token_id"]
    for name in ("logp_proximal", "logp_theta", "log_r_d", "log_r_s"):
        assert gap(one, two, name) <= 1e-5
    first, again = (events_of(tmp_path / name, "update")[0].metrics for name in ("one", "two"))
    assert first["loss/value"] == pytest.approx(again["loss/value"], abs=1e-5)
    assert first["grad/norm"] == pytest.approx(again["grad/norm"], rel=1e-5)
    assert first["grad/norm"] > 1e-3
    left, right = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    assert largest_difference(left, right, "master") <= 1e-4
    if "kl_coefficient" in CASES[case].get("objective", {}):
        found = [[e.metrics["kl/theta_ref_k3"] for e in events_of(tmp_path / name, "update")] for name in ("one", "two")]
        assert found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-6)
        assert min(map(max, found)) > 1e-5
    if case == "moments on the host":
        assert largest_difference(left, right, "exp_avg") <= 1e-4
    if "adapters" in case:
        trained = of_kind("master", left)
        assert all(name.endswith(".default.weight") for name in trained), "a version is its adapters"
        assert max(float(w.abs().max()) for name, w in trained.items() if "lora_B" in name) > 1e-3, "they were zero"
    else:
        assert largest_difference(left, state_of_start(tiny_folder), "master") > 1e-3, "the weights moved"
    if "ewma" in case:
        assert largest_difference(left, right, "averaged") <= 1e-4
    told = [[update.metrics for update in events_of(tmp_path / name, "update")] for name in ("one", "two")]
    for name in ("average/beta", "mask/band"):
        found = [[one[name] for one in metrics if name in one] for metrics in told]
        assert found[0] == pytest.approx(found[1], rel=1e-3)
    summary = summary_of(tmp_path / "two")
    assert summary["consistency_lag0_max_abs_error"] is None or summary["consistency_lag0_max_abs_error"] <= 1e-6
    assert summary["consistency_publish_max_abs_error"] in (0, None)
    assert summary["probe_max_abs_error"] <= 1e-4
    check_accounting(tmp_path / "two")


def state_of_start(folder):
    from oldlogits.models.load import load_model, named_weights

    return {f"master|{name}": weight for name, weight in named_weights(load_model(folder)).items()}


def test_patches_of_the_slices_bring_the_engine_from_version_to_version_without_a_gather(tiny_folder, tmp_path):
    config = recipe(tiny_folder, runtime={"type": "local"}, **BF16)
    status, said = finish(launch(write_recipe(tmp_path / "r.toml", config), "--out", tmp_path / "run"))
    assert status == 0, said
    summary = summary_of(tmp_path / "run")
    assert (summary["num_patch_syncs"], summary["num_full_syncs"], summary["num_refused_patches"]) == (4, 1, 0)
    assert summary["version_share_of_copy"] < 0.3
    assert summary["provenance"].keys() == {"exact"}
    assert summary["consistency_publish_max_abs_error"] in (0, None)
    assert summary["probe_max_abs_error"] <= 1e-4, "the engine holds the bits of all slices"


@pytest.mark.parametrize("on_host", [False, True])
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(tiny_folder, tmp_path, on_host):
    config = recipe(tiny_folder, num_updates=2, model={"forward_dtype": "bf16"}, trainer={"offload_optimizer": on_host})
    file = write_recipe(tmp_path / "r.toml", config)
    status, said = finish(launch(file, "--out", tmp_path / "two"))
    assert status == 0, said
    files = {path.name for path in (tmp_path / "two/checkpoints/v000002/state").iterdir()}
    assert {f"trainer-0000{rank}-of-00002.safetensors" for rank in (0, 1)} <= files, "each rank writes what it holds"
    before = state_of(tmp_path / "two")
    longer = recipe(tiny_folder, num_updates=4, model={"forward_dtype": "bf16"})
    assert run(longer, tmp_path / "two", resume=True).error is None
    assert [e.version for e in events_of(tmp_path / "two", "update")] == [1, 2, 3, 4]
    assert {value.item() for value in of_kind("step", state_of(tmp_path / "two")).values()} == {8.0}
    assert {value.item() for value in of_kind("step", before).values()} == {4.0}


@pytest.mark.parametrize("is_on_host", [False, True])
def test_a_checkpoint_of_one_process_goes_on_over_two_ranks_as_it_does_in_one(tiny_folder, tmp_path, is_on_host):
    sections = {"model": {"forward_dtype": "bf16"}, "trainer": {"offload_optimizer": is_on_host}}
    config = recipe(tiny_folder, num_updates=2, **sections)
    assert run(config, tmp_path / "one").error is None
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    status, said = finish(launch("--resume", tmp_path / "two", "--num-updates", "3"))
    assert status == 0, said
    longer = recipe(tiny_folder, num_updates=3, **sections)
    assert run(longer, tmp_path / "one", resume=True).error is None
    assert largest_difference(state_of(tmp_path / "one"), state_of(tmp_path / "two"), "master") <= 1e-4
    assert largest_difference(state_of(tmp_path / "one"), state_of(tmp_path / "two"), "exp_avg") <= 1e-4


def ranks_of(process):
    """The process ids of the launch's ranks, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            if stat[1] != str(process.pid):
                continue
            environment = (folder / "environ").read_text().split("\0")
            found[next(int(word[5:]) for word in environment if word.startswith("RANK="))] = int(folder.name)
        except (OSError, StopIteration, IndexError):
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("killed, status", [(1, "error"), (0, None)])
def test_a_rank_that_is_killed_ends_the_run_soon_and_is_named_with_the_last_checkpoint(tiny_folder, tmp_path, killed, status):
    config = recipe(tiny_folder, num_updates=500, runtime={"type": "local"}, record={"checkpoint_every": 2}, **BF16)
    process = launch(write_recipe(tmp_path / "r.toml", config), "--out", tmp_path / "run")
    try:
        wait_for_updates(tmp_path / "run", 3)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    ranks = ranks_of(process)
    os.kill(ranks[killed], signal.SIGKILL)
    code, said = finish(process)
    assert code != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    if status is None:
        return
    assert "error: rank 1 of 2 ended, or no longer answers" in said
    assert "go on from the last checkpoint, v0000" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ended"] == status
    check_accounting(tmp_path / "run")


@pytest.mark.parametrize(
    ("model", "current", "checkpointing"), [({}, "scored", True), ({"lora_rank": 4}, "training-forward", False)]
)
def test_two_ranks_in_bf16_are_exact_at_lag_0_and_same_shape_leaves_no_noise(
    tiny_folder, tmp_path, model, current, checkpointing
):
    config = recipe(
        tiny_folder,
        num_updates=3,
        model=model,
        trainer={
            "compute": "bf16",
            "lr": 1e-3,
            "activation_checkpointing": checkpointing,
            "micro_batch_tokens": 200,
            "head_chunk_tokens": 16,
        },
        proximal={"scoring": "same-shape", "current_version": current},
    )
    status, said = finish(launch(write_recipe(tmp_path / "r.toml", config), "--out", tmp_path / "two"))
    assert status == 0, said
    summary = summary_of(tmp_path / "two")
    assert summary["consistency_lag0_max_abs_error"] == summary["consistency_rescored_max_abs_error"] == 0
    assert summary["consistency_publish_max_abs_error"] == 0
    assert summary["num_digests"] > 0
    assert summary["provenance"].keys() == {"exact"}
    assert 0 <= summary["packing_max_abs_error"] < 0.1
