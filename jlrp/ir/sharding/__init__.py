"""Programs over several devices, as programs of one."""
