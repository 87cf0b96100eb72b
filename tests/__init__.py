"""The tests, by layer: t0 is pure logic, t6 runs whole engines."""
