"""The entry point ``vllm.general_plugins``: gives the connector its short name in every process of vLLM."""

import contextlib

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

__all__ = ["register"]

NAME = "KvfsConnector"


def register() -> None:
    """Make ``"kv_connector": "KvfsConnector"`` work with no module path. Loading the plugin twice does no harm."""
    with contextlib.suppress(ValueError):
        KVConnectorFactory.register_connector(NAME, "kvfs.vllm_hook.connector", NAME)
