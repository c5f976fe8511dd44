"""Speed and memory measured on this machine: single layers, ranks, what autograd saves."""
