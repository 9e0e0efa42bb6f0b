"""Sentences on eight topics, ragged in length, and the questions that are asked of them."""

SENTENCES: tuple[str, ...] = (
    # repairing a bicycle
    "To mend a puncture, take the inner tube out, roughen the rubber and press a patch on.",
    "A worn chain skips over the teeth of the cassette when you stand up on the pedals.",
    "Brake pads are due when the grooves have gone.",
    (
        "True a wheel by turning the spoke nipples a quarter at a time while watching the rim pass "
        "the gauge, and never tighten one side without easing the other."
    ),
    "Tyres lose a little air every week.",
    # the sky
    "Jupiter's four largest moons can be seen with ordinary binoculars on a clear night.",
    "A total eclipse happens when the moon covers the whole disc of the sun.",
    "Neutron stars pack more than the mass of the sun into a ball twenty kilometres across.",
    "Light from the Andromeda galaxy left it two and a half million years ago.",
    "Comets grow tails near the sun.",
    # the kitchen
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "Salt the water for pasta generously and keep a cup of it back for the sauce.",
    "Onions go sweet if you let them brown slowly over a low flame for most of an hour.",
    "Rest the meat before carving.",
    (
        "Whisk the egg whites until they hold a stiff peak, then fold them into the batter with a "
        "spoon so that the air stays in and the cake comes out light."
    ),
    # the body
    "A fever is the body raising its own temperature to slow an infection down.",
    "Vaccines show the immune system a harmless piece of a virus ahead of time.",
    "Regular walking lowers blood pressure within a few weeks.",
    "Too little sleep makes people hungrier the next day.",
    "The heart beats about a hundred thousand times a day.",
    # computers
    "The program ran out of memory because it kept every intermediate matrix.",
    "A hash table finds an entry in constant time on average.",
    "Compilers reorder instructions so that the processor does not wait for memory.",
    (
        "Encrypt the backup before it leaves the building, and keep the key somewhere that does "
        "not burn down together with the disks."
    ),
    "Turn it off and on again.",
    # the garden
    "Tomatoes split when heavy rain follows a dry spell.",
    "Prune apple trees in late winter, before the buds open.",
    "Slugs will not cross a strip of copper around the bed.",
    "Coffee grounds and vegetable peel turn into rich compost in about half a year.",
    "Water early in the morning.",
    # history
    "The printing press made books cheap enough for merchants and students to own.",
    "Roman engineers carried water across valleys on arches of stone.",
    "The telegraph brought the news of a battle to the capital on the same day.",
    "Silk travelled west along caravan routes for more than a thousand years.",
    (
        "Cholera in London was traced to a single pump by a doctor who drew every death on a map "
        "of the streets around it."
    ),
    # the weather
    "Thunderclouds form where warm, damp air is pushed up quickly.",
    "Fog in the valley clears once the sun warms the ground.",
    "Hurricanes weaken over land because they lose the warm sea that feeds them.",
    "A ring around the moon often means rain within a day.",
    "Snow muffles sound.",
)

QUERIES: tuple[str, ...] = (
    "How do I repair a flat tire on my bike?",
    "How did people learn that dirty water spreads disease?",
    "Why does my program need so much RAM?",
    "What can I see in the sky without a big telescope?",
    "How do I keep snails away from my vegetables?",
)
