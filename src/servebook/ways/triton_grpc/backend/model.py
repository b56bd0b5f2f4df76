"""The `vllm` backend itself: Triton runs this file in its Python stub, for every model with `backend: "vllm"`.

Light to import: Triton loads it twice, and the first time only to fill in the model's configuration.
"""

from __future__ import annotations

import json
import locale
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton_python_backend_utils as pb_utils

# The stub's interpreter is an isolated one: it ignores PYTHONPATH.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

from servebook.engine.start import pause  # noqa: E402
from servebook.ways.triton_grpc.backend.declaration import FLAGS, INPUTS, OUTPUTS  # noqa: E402

if TYPE_CHECKING:
    from servebook.ways.triton_grpc.backend.engine import Engine


class TritonPythonModel:
    """What Triton calls: first `auto_complete_config`, then `initialize`, `execute` for each request, `finalize`."""

    engine: Engine | None = None

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Fill in what config.pbtxt left out: tensors, no batching by Triton, many responses per request."""
        declared = config.as_dict()
        for tensor in INPUTS:
            if tensor["name"] not in {entry["name"] for entry in declared["input"]}:
                config.add_input(tensor)
        for tensor in OUTPUTS:
            if tensor["name"] not in {entry["name"] for entry in declared["output"]}:
                config.add_output(tensor)
        config.set_max_batch_size(0)
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Start the engine; an exception here fails the load, with its message.

        Raises:
            ModelFilesError: model.json or multi_lora.json does not fit.
        """
        pause()
        # The stub's interpreter starts in ASCII, and importing torch reads files that are not.
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
        parameters = json.loads(args["model_config"]).get("parameters", {})
        for name in parameters.keys() - set(FLAGS):
            pb_utils.Logger.log_warn(
                f"config.pbtxt: parameter {name} has no effect; engine arguments belong into 1/model.json"
            )
        flags = {name: parameters.get(name, {}).get("string_value", "").lower() == "true" for name in FLAGS}
        # A forked engine would hold the guardian's pipe open, and not bear its mark.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        if args["model_instance_kind"] == "GPU":  # one instance per device, each with its own
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]

        from servebook.ways.triton_grpc.backend.files import read_engine_args, read_loras

        folder = Path(pb_utils.get_model_dir())
        engine_args = read_engine_args(folder)
        loras = read_loras(folder, engine_args)

        from servebook.ways.triton_grpc.backend.engine import Engine
        from servebook.ways.triton_grpc.backend.metrics import stat_logger_factory

        labels = {"model": args["model_name"], "version": args["model_version"]}
        report = flags["REPORT_CUSTOM_METRICS"] and not engine_args.disable_log_stats
        name = args["model_name"]
        self.engine = Engine(
            engine_args,
            loras,
            stat_loggers=[stat_logger_factory(labels)] if report else [],
            on_death=(lambda: pb_utils.unload_model(name)) if flags["ENABLE_VLLM_HEALTH_CHECK"] else None,
        )

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to the engine. Their responses come later, through their response senders."""
        assert self.engine
        for request in requests:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            self.engine.submit(tensors, request.parameters(), request.get_response_sender())

    def finalize(self) -> None:
        """End the engine and every process of it."""
        if self.engine:
            self.engine.shutdown()
