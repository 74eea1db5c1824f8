# Included by the top Makefile: a real Kubernetes on this machine (Linux, root, Go), for trying things by hand.
.PHONY: cluster cluster-down
PYTHON ?= python3
CLUSTER_NODES ?= 2

cluster: ## start a real 2-node Kubernetes cluster on this machine (CLUSTER_NODES=0: control plane only)
	@$(PYTHON) tests/cluster/cluster.py up --nodes $(CLUSTER_NODES)

cluster-down: ## remove it without a trace
	@$(PYTHON) tests/cluster/cluster.py down
