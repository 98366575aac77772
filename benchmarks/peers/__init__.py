"""The engines under test, by the names ``--peers`` takes."""

from __future__ import annotations

from importlib import import_module

from benchmarks.peers.base import Peer

PEERS = {
    "ours": "benchmarks.peers.ours:OursPeer",
    "generate": "benchmarks.peers.transformers_generate:GeneratePeer",
    "generate-f32": "benchmarks.peers.transformers_generate:GenerateF32Peer",
    "transformers-cb": "benchmarks.peers.transformers_cb:ContinuousBatchingPeer",
    "transformers-cb-f32": "benchmarks.peers.transformers_cb:ContinuousBatchingF32Peer",
    "llama.cpp": "benchmarks.peers.llama_cpp:LlamaCppPeer",
    "llama.cpp-f16": "benchmarks.peers.llama_cpp:LlamaCppF16Peer",
    "llama.cpp-q8_0": "benchmarks.peers.llama_cpp:LlamaCppQ80Peer",
    "llama.cpp-q4_0": "benchmarks.peers.llama_cpp:LlamaCppQ40Peer",
    "llama.cpp-q4_k_m": "benchmarks.peers.llama_cpp:LlamaCppQ4KMPeer",
}
DEFAULT_PEERS = ("ours", "generate", "transformers-cb", "llama.cpp")


def create_peer(name: str) -> Peer:
    """A fresh, unloaded peer. Its module is imported here and not before, so no peer pays for another's imports."""
    module_name, class_name = PEERS[name].split(":")
    peer: Peer = getattr(import_module(module_name), class_name)()
    return peer
