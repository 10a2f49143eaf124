"""The plan of a recipe: what it recommends and why, what it refuses, and that what ships for it runs."""

import json
import math
import resource
import shlex
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import yaml
from conftest import ROOT, World, launch
from plans_page import page
from transformers import OPTConfig, OPTForCausalLM

from launch import memory, speed
from launch.activations import MicroBatch, Way
from launch.config import load_recipe
from launch.errors import ConfigError, ModelError
from launch.free_memory import limit_bytes
from launch.hardware import GPUS, Hardware, find_hardware, host_memory_bytes, parse_size_bytes
from launch.plan import ACCELERATE, LAYOUTS, Case, Choice, choices, find_base, make_case, read_sharding, recommend
from launch.plan_report import changes, command, plan_lines, write_plan

QWEN_14B = "configs/recipes/qwen1.5-14b-lora.yaml"
CONFIG_14B = Path("tests/model_configs/qwen1.5-14b-chat.json")
FOUR_V100 = ["--gpu", "v100-32gb", "--gpus", "4", "--host-memory", "380GB"]


def hardware(gpu: str = "v100-32gb", gpus: int = 4, *, interconnect: str = "pcie", host: str = "380GB") -> Hardware:
    return find_hardware(gpu, gpus, 1, host, interconnect)


def case_of_14b(machine: Hardware, *overrides: str) -> Case:
    recipe = load_recipe(ROOT / QWEN_14B, overrides)
    return make_case(recipe, find_base(recipe, CONFIG_14B), machine, 1.0)


def chosen_of(case: Case) -> Choice:
    chosen = recommend(case, choices(case))
    assert chosen is not None
    return chosen


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# ---- what it recommends ----


@pytest.mark.parametrize("interconnect", ["pcie", "nvlink"])
def test_14b_on_four_v100_is_sharded_and_needs_no_offload(interconnect: str) -> None:
    """28 GB of frozen fp16 weights, 7 GB a GPU; what they leave is for activations and logits."""
    case = case_of_14b(hardware(interconnect=interconnect))
    chosen = chosen_of(case)
    assert (chosen.layout, chosen.load_in_4bit) == ("zero3_no_offload", False)
    assert 28.3e9 < case.base.num_parameters * 2 < 28.4e9
    assert chosen.demand.gpu["weights"] == pytest.approx(28.33e9 / 4, rel=0.01)
    assert chosen.demand.gpu_bytes <= 0.9 * GPUS["v100-32gb"].memory_bytes
    assert case.precision == "fp16"


def test_offload_costs_more_the_fewer_tokens_a_micro_batch_has() -> None:
    """Weights cross PCIe for each micro-batch, however small it is."""
    case = case_of_14b(hardware(interconnect="nvlink"))
    model, slower = case.model(False), []
    for tokens in (230, 920, 3680, 14720):
        seconds = []
        for layout in ("zero3", "zero3_no_offload"):
            way = Way(2, 1, False, True, True)
            work = speed.work_of(model, read_sharding(layout), 4, case.micro_batch(tokens), way)
            seconds.append(speed.seconds_of_step(work, case.hardware, 1).worst)
        slower.append(seconds[0] / seconds[1])
    assert slower == sorted(slower, reverse=True)
    assert slower[0] > 2 and 1 < slower[-1] < 1.2


def test_dora_costs_memory_and_seconds() -> None:
    """The copies of the widest matrix, two results a layer, and under dropout each product once more."""
    plain, dora = case_of_14b(hardware()), case_of_14b(hardware(), "adapter.use_dora=true", "adapter.lora_dropout=0.1")
    before, after = (
        next(one for one in choices(case) if (one.layout, one.gradient_checkpointing) == ("zero3_no_offload", True))
        for case in (plain, dora)
    )
    copies = (13696 * 13696 + 3 * 13696 * 5120) * 2
    assert after.demand.gpu["gathered weights"] - before.demand.gpu["gathered weights"] >= copies
    assert after.largest_budget_tokens < before.largest_budget_tokens
    batch = MicroBatch(1000, 1000, 100, 100)
    more = speed.forward_flops(dora.model(False), batch)[0] / speed.forward_flops(plain.model(False), batch)[0]
    assert 1.8 < more < 2


def test_baichuan_13b_holds_its_table_of_positions() -> None:
    """ALiBi of 40 heads and 4,096 positions, in fp16, on every GPU."""
    recipe = load_recipe(ROOT / QWEN_14B, ["adapter.target_modules=[W_pack]", "model.attn_implementation=eager"])
    base = find_base(recipe, Path("tests/model_configs/baichuan2-13b.json"))
    case = make_case(recipe, base, hardware(), 1.0)
    assert memory.constants_bytes(case.model(False)) == 40 * 4096 * 4096 * 2
    assert not case.packed


def test_what_a_factory_builds_is_not_planned_in_four_bits() -> None:
    recipe = load_recipe(ROOT / "configs/recipes/chatglm-6b-own-model.yaml")
    case = make_case(recipe, find_base(recipe, Path("tests/model_configs/chatglm-6b.json")), hardware(), 1.0)
    assert {one.load_in_4bit for one in choices(case)} == {False}


def test_a_small_model_is_replicated_and_a_large_one_offloaded() -> None:
    assert chosen_of(case_of_14b(hardware("h100"))).layout.startswith("zero2")
    one_small = case_of_14b(hardware("v100-16gb", 1))
    found = choices(one_small)
    chosen = recommend(one_small, found)
    assert chosen is not None and chosen.layout == "zero3" and not chosen.load_in_4bit
    assert {one.obstacle for one in found if one.layout == "zero3_no_offload" and not one.load_in_4bit} == {
        "GPU memory"
    }


def test_four_bits_are_recommended_where_nothing_else_fits_only() -> None:
    """And said to change the results; the command has it."""
    case = case_of_14b(hardware("v100-16gb", 1, host="50GB"))
    found = choices(case)
    chosen = recommend(case, found)
    assert chosen is not None and chosen.load_in_4bit
    assert all(one.obstacle for one in found if not one.load_in_4bit)
    said = plan_lines(case, found, chosen, [QWEN_14B])
    assert "which changes the results" in " ".join(said.split()) and "model.load_in_4bit=true" in said


def test_host_memory_is_counted() -> None:
    """ZeRO-2 loads the whole model once for each rank."""
    found = choices(case_of_14b(hardware("h100", host="100GB")))
    obstacles = {one.obstacle for one in found if one.layout == "zero2" and not one.load_in_4bit}
    assert obstacles == {"host memory"}


def test_the_budget_that_fits_fits_and_one_token_more_does_not() -> None:
    """Whole samples are the steps of the recommended one; the largest is exact."""
    case = case_of_14b(hardware())
    chosen = chosen_of(case)
    assert chosen.largest_budget_tokens >= chosen.budget_tokens
    assert chosen.budget_tokens % case.longest_tokens == 0
    longer = case_of_14b(
        hardware(), f"data.max_length={chosen.largest_budget_tokens}", "train.max_tokens_per_micro_batch=30000"
    )
    too_long = case_of_14b(
        hardware(), f"data.max_length={chosen.largest_budget_tokens + 1}", "train.max_tokens_per_micro_batch=30000"
    )
    alike = (chosen.layout, chosen.gradient_checkpointing, chosen.load_in_4bit)

    def obstacle(case: Case) -> str:
        return next(
            one.obstacle for one in choices(case) if (one.layout, one.gradient_checkpointing, one.load_in_4bit) == alike
        )

    assert obstacle(longer) == "" and obstacle(too_long) == "GPU memory"


def test_samples_longer_than_the_window_bring_the_mask_back() -> None:
    """Of all pairs of the row's tokens (launch/sample_attention.py); others are attended one by one."""
    case = case_of_14b(hardware())
    windowed = replace(case, base=replace(case.base, window_tokens=512))
    assert not case.sizes(4096, 513, 100).is_masked
    for longest, columns in ((512, 512), (513, 4096)):
        sizes = windowed.sizes(4096, longest, 100)
        assert (sizes.is_masked, sizes.num_columns) == (longest > 512, columns)


def test_what_a_run_knows_of_its_head_goes_before_what_is_likely() -> None:
    case = case_of_14b(hardware())
    unknown = replace(case, base=replace(case.base, family="glm"))
    assert case.is_judged_in_head and not unknown.is_judged_in_head
    assert replace(unknown, judged=True).is_judged_in_head and not replace(case, judged=False).is_judged_in_head


def test_nothing_fits_says_what_lacks_least() -> None:
    case = case_of_14b(hardware("t4", 1, host="20GB"))
    found = choices(case)
    assert recommend(case, found) is None
    assert "nothing fits" in plan_lines(case, found, None, [QWEN_14B])


# ---- work and seconds, by hand ----


def test_work_of_a_micro_batch() -> None:
    """14B: twice the matrices' numbers a token and pass; ZeRO-3 receives three quarters of the weights, twice."""
    case = case_of_14b(hardware())
    model, batch = case.model(False), MicroBatch(1000, 1000, 100, 100)
    matrices = 40 * (4 * 5120 * 5120 + 3 * 5120 * 13696)
    layers, head = speed.forward_flops(model, batch)
    assert layers == 2 * (matrices + model.num_trained) * 1000 + 4 * 1000 * 5120 * 40 * 1000
    assert head == 2 * 152064 * 5120 * 100
    plain, again = (speed.step_flops(model, batch, Way(2, 1, False, recomputed, True)) for recomputed in (False, True))
    assert (plain, again - plain) == (2 * (layers + head), layers)
    way = Way(2, 1, False, True, True)
    whole = memory.parameter_bytes(model, 1, 3)
    offloaded = speed.work_of(model, read_sharding("zero3"), 4, batch, way)
    kept = speed.work_of(model, read_sharding("zero3_no_offload"), 4, batch, way)
    assert kept.network_bytes == 0.75 * (2 * whole + model.num_trained * 2)
    assert kept.pcie_bytes == 0 < offloaded.step_pcie_bytes
    assert offloaded.pcie_bytes == whole / 2 + memory.trained_share(model, 4, 3) * 4
    alone = speed.work_of(model, read_sharding("zero3_no_offload"), 1, batch, way)
    assert alone.network_bytes == 0


def test_seconds_are_bound_by_what_takes_longest() -> None:
    machine = hardware()
    computing = speed.Work(125e12, 0, 1e9, 0, 0, 0)
    seconds = speed.seconds_of_step(computing, machine, 2)
    assert seconds.bound == "compute" and seconds.best == pytest.approx(2 / 0.5)
    assert seconds.worst == pytest.approx(2 / 0.2 + 2 * 1 / 16 / 0.4)
    assert math.isclose(seconds.middle, math.sqrt(seconds.best * seconds.worst))
    assert speed.seconds_of_step(speed.Work(1e12, 0, 160e9, 0, 0, 0), machine, 1).bound == "network"
    assert speed.seconds_of_step(speed.Work(1e12, 0, 160e9, 0, 0, 0), hardware(gpus=1), 1).bound == "compute"


# ---- hardware ----


def test_sizes_and_gpus_that_are_none_are_refused() -> None:
    assert parse_size_bytes("--host-memory", "380GB") == 380_000_000_000
    assert parse_size_bytes("--host-memory", "1.5TiB") == int(1.5 * 2**40)
    with pytest.raises(ConfigError, match=r"--host-memory '380' is no size; write 380GB"):
        parse_size_bytes("--host-memory", "380")
    with pytest.raises(
        ConfigError, match=r"--gpu v100 is not known to plan; the known ones are v100-16gb, v100-32gb, t4"
    ):
        find_hardware("v100", 4, 1, None, None)
    with pytest.raises(ConfigError, match=r"--interconnect nvlink: plan has no NVLink figure for a t4; take pcie"):
        find_hardware("t4", 4, 1, None, "nvlink")
    with pytest.raises(ConfigError, match="bf16, which a v100-32gb does not do"):
        case_of_14b(hardware(), "train.precision=bf16")


def test_an_allocation_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "3", "SLURM_MEM_PER_NODE": "512"}.items():
        monkeypatch.setenv(name, value)
    found = find_hardware("a100-80gb", None, None, None, None)
    assert (found.num_ranks, found.gpus_per_node, found.interconnect) == (6, 3, "pcie")
    assert found.host_memory_bytes == 512 << 20


@pytest.mark.parametrize(
    ("variables", "mebibytes"),
    [
        ({"SLURM_MEM_PER_NODE": "512"}, 512),
        ({"SLURM_MEM_PER_CPU": "64", "SLURM_CPUS_ON_NODE": "4"}, 256),
        ({"SLURM_MEM_PER_GPU": "96", "SLURM_GPUS_ON_NODE": "2"}, 192),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({}, None),
    ],
)
def test_what_slurm_gives_is_all_there_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], mebibytes: int | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert host_memory_bytes() == (limit_bytes() if mebibytes is None else mebibytes << 20)


@pytest.mark.parametrize(
    ("smi_name", "known", "interconnect"),
    [
        ("Tesla V100-SXM2-32GB", "v100-32gb", "nvlink"),
        ("Tesla V100-PCIE-16GB", "v100-16gb", "pcie"),
        ("Tesla T4", "t4", "pcie"),
        ("NVIDIA A10", "a10", "pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", "nvlink"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb", "pcie"),
        ("NVIDIA L40S", "l40s", "pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", "pcie"),
        ("NVIDIA H100 80GB HBM3", "h100", "pcie"),
        ("NVIDIA A10G", None, "pcie"),
    ],
)
def test_this_machine_has_what_nvidia_smi_says(
    smi_name: str, known: str | None, interconnect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{smi_name}'\necho '{smi_name}'\necho '{smi_name}'\n", encoding="utf-8")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    if known is None:
        with pytest.raises(ConfigError, match=f"This machine's {smi_name} is not known to plan; name the nearest"):
            find_hardware(None, None, None, None, None)
        return
    found = find_hardware(None, None, None, None, None)
    assert (found.gpu.name, found.gpus_per_node, found.interconnect) == (known, 2, interconnect)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="This machine has no GPU that nvidia-smi knows; name one: --gpu v100-16gb"):
        find_hardware(None, None, None, None, None)


# ---- the command ----


def test_the_command_answers_within_80_columns_and_before_torch_would_be_imported() -> None:
    """Commands are not wrapped. Seconds are of the CPU, so that a slow machine is slow in both."""
    begin = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = plan(QWEN_14B, *FOUR_V100, "--config", str(CONFIG_14B), "data.train=MY ROWS.jsonl")
    planned = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert done.returncode == 0, done.stderr
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    assert planned - begin < resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - planned
    shown = done.stdout.splitlines()
    start = next(number for number, line in enumerate(shown) if line.startswith("  accelerate launch"))
    wide = [line for number, line in enumerate(shown) if len(line) > 80 and number not in (start, start + 1)]
    assert wide == []
    assert shown[0].startswith("  recommended  zero3_no_offload with gradient checkpointing, 7,360 tokens")
    words = shlex.split(" ".join(shown[start : start + 2]).replace(" \\ ", " "))
    assert words[:6] == shlex.split(
        "accelerate launch --config_file configs/accelerate/zero3_no_offload.yaml --num_processes 4"
    )
    overrides = words[words.index("train.py") + 2 :]
    assert overrides == ["data.train=MY ROWS.jsonl", "train.max_tokens_per_micro_batch=7360"]
    assert load_recipe(ROOT / QWEN_14B, overrides).train.max_tokens_per_micro_batch == 7360


def test_each_of_several_nodes_is_told_what_to_run() -> None:
    machine = find_hardware("v100-32gb", 4, 2, "380GB", None)
    case = case_of_14b(machine)
    start = command(case, chosen_of(case), [QWEN_14B])
    assert "--num_processes 8 --num_machines 2 --machine_rank RANK --main_process_ip ADDRESS" in start
    assert "--deepspeed_multinode_launcher standard train.py" in start


def test_json_has_every_choice() -> None:
    done = plan(QWEN_14B, *FOUR_V100, "--config", str(CONFIG_14B), "--json")
    tree = json.loads(done.stdout)
    assert len(tree["choices"]) == 20
    chosen = tree["choices"][tree["recommended"]]
    assert chosen["layout"] == "zero3_no_offload" and chosen["seconds"]["best"] < chosen["seconds"]["worst"]
    assert tree["command"].startswith("accelerate launch --config_file configs/accelerate/zero3_no_offload.yaml")


def test_a_written_plan_is_what_was_recommended(tmp_path: Path) -> None:
    """The recipe loads with the planned values, the accelerate file names the shipped JSON; nothing is written over."""
    case = case_of_14b(hardware(gpus=3))
    chosen = chosen_of(case)
    start = write_plan(case, chosen, tmp_path / "plan")
    recipe = load_recipe(tmp_path / "plan" / "recipe.yaml")
    assert changes(recipe, chosen) == {} and changes(case.recipe, chosen) != {}
    assert recipe.run == case.recipe.run
    shipped = yaml.safe_load(chosen.accelerate_file.read_text(encoding="utf-8"))
    written = yaml.safe_load((tmp_path / "plan" / "accelerate.yaml").read_text(encoding="utf-8"))
    assert written == shipped | {"num_processes": 3}
    assert shlex.split(start)[3] == str(tmp_path / "plan" / "accelerate.yaml")
    with pytest.raises(ConfigError, match=r"accelerate\.yaml is there, and nothing is written over"):
        write_plan(case, chosen, tmp_path / "plan")


def test_a_local_base_is_planned_by_its_own_files(world: World) -> None:
    """The sum of the shapes in the headers, and tied or not as they say."""
    base = find_base(load_recipe(world.recipe("local")), None)
    (file,) = world.base.glob("*.safetensors")
    header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert base.num_parameters * 4 == file.stat().st_size - header_bytes


COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub for `owner/name`, from a directory; it counts the bytes of files."""

    directory: Path
    sent: ClassVar[list[int]]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        """The repository's files, one of them, or a part of one."""
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/"):
            files = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "1", "rfilename": path.name}
                for path in self.directory.iterdir()
            ]
            tree: Any = files if "/tree/" in self.path else {"id": "owner/name", "sha": COMMIT, "siblings": files}
            content = json.dumps(tree).encode()
        elif (self.directory / name).is_file():
            content = (self.directory / name).read_bytes()
        else:
            self.send_error(404)
            return
        whole = len(content)
        part = self.headers["Range"]
        if part:
            first, last = (int(number) for number in part.removeprefix("bytes=").split("-"))
            content = content[first : last + 1]
        self.send_response(206 if part else 200)
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) if self.command == "GET" or not part else whole))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
            self.sent.append(len(content))

    def log_message(self, *given: Any) -> None:
        """Nothing."""


def test_of_a_model_on_the_hub_the_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT, whose layers plan does not know, from a hub on this machine: 3 MB of weights, of which 0.1 MB are sent."""
    settings = {"vocab_size": 3000, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_hidden_layers": 2}
    config = OPTConfig(num_attention_heads=4, max_position_embeddings=9000, **settings)
    model = OPTForCausalLM(config)
    model.save_pretrained(str(tmp_path / "there"))
    monkeypatch.setattr(Hub, "directory", tmp_path / "there", raising=False)
    monkeypatch.setattr(Hub, "sent", [], raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    recipe = load_recipe(ROOT / QWEN_14B, ["model.name_or_path=owner/name"])
    base = find_base(recipe, None)
    server.shutdown()
    assert base.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (base.layer_prefix, base.intermediate_size) == ("model.decoder.layers.", 96)
    assert sum(Hub.sent) < 200_000 < base.num_parameters * 4


def test_what_cannot_be_planned_is_refused_in_one_sentence(world: World) -> None:
    done = plan("configs/recipes/chatglm-6b-own-model.yaml", *FOUR_V100)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "builds a model of your own, whose layers only its code knows" in done.stderr
    with pytest.raises(ModelError, match="is built on the spot and fits anywhere; plan a real model"):
        find_base(load_recipe(ROOT / "configs/recipes/tiny.yaml"), None)


# ---- what ships ----


def test_layouts_differ_in_offload_only() -> None:
    """One JSON for each accelerate file; those of a stage are equal but for what they offload."""
    assert {f"{layout}.yaml" for layout in LAYOUTS} == {path.name for path in ACCELERATE.glob("*.yaml")}
    zero: dict[int, list[dict[str, Any]]] = {2: [], 3: []}
    for layout in LAYOUTS:
        settings = yaml.safe_load((ACCELERATE / f"{layout}.yaml").read_text(encoding="utf-8"))
        tree = json.loads(Path(settings["deepspeed_config"].pop("deepspeed_config_file")).read_text(encoding="utf-8"))
        stage = tree["zero_optimization"]["stage"]
        assert settings["deepspeed_config"] == {"zero3_init_flag": stage == 3}
        offload = {key: tree["zero_optimization"].pop(key, None) for key in ("offload_optimizer", "offload_param")}
        assert set(map(str, offload.values())) <= {"None", "{'device': 'cpu', 'pin_memory': True}"}
        zero[stage].append(tree)
    assert [len(trees) for trees in zero.values()] == [2, 3]
    assert all(tree == trees[0] for trees in zero.values() for tree in trees)


@pytest.mark.slow
def test_every_layout_trains_alike(world: World) -> None:
    """Two ranks on the shipped JSON; the losses are those of the others."""
    losses = {}
    for layout in LAYOUTS:
        settings = yaml.safe_load((ACCELERATE / f"{layout}.yaml").read_text(encoding="utf-8"))
        deepspeed = ROOT / settings["deepspeed_config"]["deepspeed_config_file"]
        launch(world.recipe(layout), 2, deepspeed=deepspeed)
        losses[layout] = [record["loss"] for record in world.metrics(layout, "train")]
    assert len(losses["zero3"]) == 4
    for layout in LAYOUTS:
        assert losses[layout] == pytest.approx(losses["zero3"], rel=1e-5), layout


def test_the_page_of_plans_is_what_plan_says() -> None:
    """`python tests/plans_page.py > docs/plans.md` writes it."""
    assert (ROOT / "docs" / "plans.md").read_text(encoding="utf-8") == page()
