"""A deployment's settings, from environment variables as Ray gives them."""

import pickle

import pytest
import torch

from aapt.serve.settings import Deployment, Settings


def test_without_variables_the_bundled_model_runs_on_the_cpu():
    found = Deployment.from_environment({"PATH": "/bin"})
    nothing = {"device": "cpu", "dtype": None, "size": None, "cache": "model"}
    assert found == Deployment("tiny-world", nothing, 2, Settings())
    assert found.gpus == 0


def test_a_replica_takes_the_options_of_the_command():
    found = Deployment.from_environment(
        {
            "AAPT_MODEL": "runs/mine",
            "AAPT_DEVICE": "cuda:1",
            "AAPT_DTYPE": "float16",
            "AAPT_SIZE": "736x416",
            "AAPT_CACHE": "float8",
            "AAPT_SESSIONS": "8",
            "AAPT_BATCH": "1",
            "AAPT_REPLICAS": "3",
            "AAPT_TOKEN": "word",
        }
    )
    placed = {"device": "cuda:1", "dtype": torch.float16, "size": (416, 736)}
    assert found.placement == placed | {"cache": "float8"}
    assert found.settings == Settings(sessions=8, batch=True, token="word")
    assert (found.model, found.replicas, found.gpus) == ("runs/mine", 3, 1)
    assert pickle.loads(pickle.dumps(found)) == found  # Ray sends it to the replicas


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AAPT_DEVICE", "meta", "expected cpu, cuda or cuda:N, got meta"),
        ("AAPT_DTYPE", "int8", "expected one of float32, bfloat16, float16, got int8"),
        ("AAPT_SIZE", "736", "expected WIDTHxHEIGHT such as 128x80, got 736"),
        ("AAPT_CACHE", "fp8", "expected one of model, float8, float8-past, got 'fp8'"),
        ("AAPT_SESSIONS", "0", "expected a number of at least 1, got 0"),
        ("AAPT_REPLICAS", "two", "expected a number of at least 1, got two"),
        ("AAPT_TOKEN", "", "expected letters, digits and . _ ~ -, got none or others"),
        ("AAPT_TOKEN", "a&b", "expected letters, digits and . _ ~ -, got none or others"),
        ("AAPT_BATCH", "2", "expected 0 or 1, got 2"),
        ("AAPT_BATCH", "yes", "expected 0 or 1, got yes"),
    ],
)
def test_a_value_that_means_nothing_is_said(name, value, words):
    with pytest.raises(ValueError, match=f"^{name}: {words}$"):
        Deployment.from_environment({name: value})
