"""A transformers model as weight matrices and blocks that run one by one."""
