//! The tables of docs/PLANS.md.
