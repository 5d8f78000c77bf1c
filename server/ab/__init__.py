"""A/B tests of policies: paired simulation, paired replay against two servers, and a live switchback on one."""
