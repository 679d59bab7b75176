//! What the controller decides from how all nodes stand. So far it adds up; waves of nodes and the judgement of a candidate
//! belong here too.

pub mod sum;
