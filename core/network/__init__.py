"""VTP, the transport for tensors between nodes (`docs/vtp.md`): frames, the proof that both ends know the cluster's
token, links, and the port that workers come to."""
