"""Shared fixtures: the device the loss is tested on, and reproducible random numbers; the order of the tests."""

import importlib.util

import pytest

import compiled_once

compiled_once.keep()

import torch  # noqa: E402  its bytecode is to be kept too

HAS_TRITON = importlib.util.find_spec("triton") is not None
NEED_TRITON = [
    "test_codegen.py", "test_compiled_prediction.py", "test_executed_faults.py", "test_executed_kernels.py", "test_executed_traffic.py",
    "test_kernel_rows_in_place.py", "test_kernel_sums.py", "test_kernel_terms.py", "test_logits_loss.py",
    "test_terms_fused.py", "test_triton_kernels.py", "test_upstream_prediction.py",
]  # fmt: skip
collect_ignore = [] if HAS_TRITON else [f"kernels/{name}" for name in NEED_TRITON]

if HAS_TRITON and not torch.cuda.is_available():
    import interpreter  # before anything that imports triton

    interpreter.make_faithful()
    interpreter.make_quick()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Long tests begin first, so that no process is left with one at the end: those of an xdist_group."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA where there is one, else the CPU; the same tests run on both."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(1234)


@pytest.fixture
def one_thread():
    """Which thread adds up what decides the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """A small character corpus in nanoGPT's format."""
    from difftrain.data import prepare

    folder = tmp_path_factory.mktemp("corpus")
    words = ["red", "green", "blue\nwhite", "black", "grey\nlong", "short", "wide", "narrow\n"]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(words), (4000,), generator=generator).tolist()
    (folder / "text.txt").write_text(" ".join(words[i] for i in picks))
    return prepare(str(folder / "text.txt"), out=folder / "tokens")


@pytest.fixture
def tiny(tmp_path, corpus_folder):
    """A function that makes the configuration of a run of a few seconds; keywords change it."""
    from difftrain.config import Config

    def make(**changes):
        values = {
            "out_dir": str(tmp_path / "run"),
            "data": str(corpus_folder),
            "device": "cpu",
            "block_size": 16,
            "batch_size": 8,
            "n_layer": 1,
            "n_head": 2,
            "n_embd": 16,
            "max_iters": 12,
            "learning_rate": 1e-2,
            "min_lr": 1e-3,
            "warmup_iters": 2,
            "masking_warmup_iters": 6,
            "eval_interval": 4,
            "eval_iters": 4,
            "eval_batch_size": 8,
            "log_interval": 1,
        }
        return Config(**(values | changes))

    return make


@pytest.fixture(params=["small", "streamed"])
def family(request):
    """Both ways in which the kernels cut rows, on the same short rows."""
    from loss_problems import rows_are

    with rows_are(request.param):
        yield request.param
