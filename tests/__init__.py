"""Tests of Ringway: unit tests flat here, integration in netns/, the benchmark in bench/."""
