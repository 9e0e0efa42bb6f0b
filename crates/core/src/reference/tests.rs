mod backward;
mod bounds;
mod case;
mod forward;
