"""How fast training is, and with what: a matrix of settings, a process and a record for each."""
