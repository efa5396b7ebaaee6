"""Running plans: values, slots, inputs, the runner, and the one thread that owns the device."""
