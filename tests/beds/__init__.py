"""Machines for tests that one kernel cannot give: real NFS clients in user-mode Linux (``make nfs``)."""
