"""Short children's stories from a small grammar: the whole of what the embedded model reads.

`python scripts/stories.py --seed 2 --count 200 > stories.txt` writes some that it has not read (it
has read 7000 of seed 1).

Everything is a template. `[a|b]` is one of its alternatives, drawn anew wherever it stands; `{slot}` is a
word of the story's cast, drawn once, and `{Slot}` the same with a capital. A blank line parts paragraphs.
Hero and friend never share a pronoun, so "he" and "she" always say who is meant.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Bundle = dict[str, str]
T = TypeVar("T")
INNERMOST = re.compile(r"\[([^\[\]]*)\]")

PRONOUNS: dict[str, Bundle] = {
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
}
PAIRS = (  # who appears together: name, kind and the relative they live with, she before he
    "Anna/girl/grandmother Ben/boy/father",
    "Lily/girl/mother Tom/boy/grandfather",
    "Nora/girl/father Hugo/boy/aunt",
    "Clara/girl/aunt Finn/boy/mother",
    "Zoe/girl/grandfather Karim/boy/uncle",
    "Ida/girl/uncle Oscar/boy/grandmother",
    "Ella/girl/father Jonas/boy/mother",
    "Vera/girl/mother Max/boy/grandfather",
    "Rosa/fox/aunt Otto/hedgehog/father",
    "Mina/mouse/mother Bruno/bear/grandmother",
    "Tilda/rabbit/grandfather Leo/badger/uncle",
    "Stella/cat/grandmother Willy/puppy/mother",
    "Maja/squirrel/uncle Milo/mole/aunt",
    "Uma/otter/father Theo/beaver/grandfather",
)
TRAITS: tuple[Bundle, ...] = (
    {"trait": "curious", "habit": "asked questions from morning to night"},
    {"trait": "kind", "habit": "liked to help everyone"},
    {"trait": "quiet", "habit": "listened more than {he} spoke"},
    {"trait": "brave", "habit": "loved a good adventure"},
    {"trait": "cheerful", "habit": "sang all day long"},
    {"trait": "clever", "habit": "could solve almost any riddle"},
    {"trait": "patient", "habit": "never hurried"},
    {"trait": "dreamy", "habit": "often looked up at the clouds"},
    {"trait": "careful", "habit": "always looked twice"},
    {"trait": "stubborn", "habit": "never gave up"},
    {"trait": "friendly", "habit": "greeted everyone {he} met"},
    {"trait": "shy", "habit": "did not talk very much"},
)
WORDS: Bundle = {
    "colour": "[red|blue|yellow|green|purple|orange|silver|golden|striped|white]",
    "toy": "[ball|kite|scarf|hat|drum|whistle|bell|lantern|bucket|umbrella|flute|blanket|spinning top|wagon"
    "|feather]",
    "food": "[piece of apple cake|honey bun|cheese sandwich|slice of cherry pie|ginger biscuit|sweet pear"
    "|loaf of bread|round cheese|warm pancake"
    "|bar of chocolate]",
    "fragile": "[jug|vase|teapot|lamp|mirror|flower pot|blue plate|glass bowl]",
    "plant": "[sunflower|pumpkin|bean plant|rose|cherry tree|melon|tomato plant]",
    "race": "[running race|sack race|barefoot race|hill race]",
    "gift": "[necklace|crown|lamp|picture|basket|garland]",
    "guest": "[robin|wren|sparrow|swallow]",
    "saying": "[Every effort moves you forward|Every effort moves you a little closer to home"
    "|A small light is brighter than no light|A kind word is never too heavy to carry"
    "|Slow steps also reach the top|Two pairs of eyes see more than one|Good things take time"
    "|The smallest friend can be the biggest help|There is always room for one more"
    "|Every day is a good day to begin]",
}
PROJECTS: tuple[Bundle, ...] = (
    {
        "project": "kite",
        "parts": "paper and string",
        "fails": "fell straight down",
        "works": "flew high above the roofs",
    },
    {
        "project": "raft",
        "parts": "logs and rope",
        "fails": "sank like a stone",
        "works": "floated like a duck",
    },
    {
        "project": "swing",
        "parts": "rope and a board",
        "fails": "broke in two",
        "works": "went up and down like a bird",
    },
    {
        "project": "cart",
        "parts": "a box and four wheels",
        "fails": "lost a wheel",
        "works": "rolled all the way down the hill",
    },
    {
        "project": "windmill",
        "parts": "sticks and cloth",
        "fails": "fell over",
        "works": "turned and turned in the wind",
    },
    {
        "project": "bird house",
        "parts": "old boards and nails",
        "fails": "came apart",
        "works": "was soon home to a {guest}",
    },
    {
        "project": "tent",
        "parts": "branches and a sheet",
        "fails": "fell on their heads",
        "works": "stood firm all night",
    },
)
FEARS: tuple[Bundle, ...] = (
    {
        "fear": "the dark",
        "trouble": "the door of the cellar had closed behind {f}, and it was as black as night down there",
        "step": "{n} went down the dark stairs, one step after another",
        "rescue": "pushed the door open",
    },
    {
        "fear": "thunder",
        "trouble": "a storm had come, and {f} was all alone in the hut at the end of the path",
        "step": "{n} ran through the storm while the thunder rolled",
        "rescue": "sat down close beside {f}",
    },
    {
        "fear": "high places",
        "trouble": "{f} had climbed a tall tree and could not come down again",
        "step": "{n} climbed from branch to branch and did not look down",
        "rescue": "showed {f} where to put {fhis} feet",
    },
    {
        "fear": "strangers",
        "trouble": "{f} had hurt {fhis} foot, and there was nobody near but a stranger with a cart",
        "step": "{n} walked up to the stranger and asked for help",
        "rescue": "rode home with {f} in the cart",
    },
    {
        "fear": "deep water",
        "trouble": "{f} was sitting in a little boat that had drifted away from the shore",
        "step": "{n} walked into the cold water until it reached {his} chin",
        "rescue": "pulled the boat back to the shore",
    },
)
NOISES: tuple[Bundle, ...] = (
    {
        "noise": "a soft tapping",
        "cause": "a branch that knocked on the window",
        "mend": "tied it back with a string",
    },
    {
        "noise": "a long creaking",
        "cause": "the garden gate, swinging in the wind",
        "mend": "closed it and went inside",
    },
    {"noise": "a strange rattling", "cause": "a loose board on the roof", "mend": "put a stone on it"},
    {
        "noise": "a sad little cry",
        "cause": "a young owl that had lost its way",
        "mend": "put it back into its nest",
    },
    {
        "noise": "a quiet scratching",
        "cause": "a tiny beetle in a paper bag",
        "mend": "let it out into the grass",
    },
    {"noise": "a low humming", "cause": "the wind in an empty bottle", "mend": "put the bottle on a shelf"},
)
SKILLS: tuple[Bundle, ...] = (
    {"skill": "whistle", "first": "only air came out", "later": "whistled a merry tune"},
    {"skill": "swim", "first": "{he} swallowed a lot of water", "later": "swam like a fish"},
    {
        "skill": "dance",
        "first": "{he} tripped over {his} own feet",
        "later": "danced in the middle of the square",
    },
    {
        "skill": "bake bread",
        "first": "the bread was as hard as a stone",
        "later": "baked enough bread for everyone",
    },
    {"skill": "ride a bicycle", "first": "{he} fell into a bush", "later": "rode once around the houses"},
    {
        "skill": "play the violin",
        "first": "it sounded like a door",
        "later": "played so well that everyone danced",
    },
    {"skill": "juggle", "first": "the balls flew in all directions", "later": "juggled with five balls"},
    {
        "skill": "tie a sailor's knot",
        "first": "the rope came loose at once",
        "later": "tied the best knot of all",
    },
)
SETTINGS: tuple[Bundle, ...] = (
    {
        "land": "[in a small village by the sea|in a fishing village|on a rocky coast|on a green island]",
        "home": "[a white house near the harbour|a blue house on the cliff|a cottage above the beach]",
        "walk": "[along the beach|past the harbour|over the dunes]",
        "dest": "[the lighthouse|the far bay|the pier]",
        "creature": "[gull|turtle|puffin]",
        "guide": "[the light of the lighthouse|the sound of the waves]",
        "gather": "[shells|smooth stones|pieces of driftwood]",
        "fine": "[sunny|warm|bright|windy]",
        "falls": "rain",
        "spots": "[behind the old boat|under the fishing nets|between the rocks|beside the lighthouse"
        "|on the dunes|under the pier]",
        "elder": "the old fisherman",
        "ehe": "he",
    },
    {
        "land": "[at the edge of a deep forest|in a quiet forest|in a clearing among tall trees]",
        "home": "[a little house under an oak tree|a wooden cabin|a cosy cottage with a green door]",
        "walk": "[along the mossy path|between the tall trees|through the forest]",
        "dest": "[the clearing|the old oak|the berry bushes]",
        "creature": "[robin|young owl|small bat]",
        "guide": "[the sound of the stream|the smell of wood smoke]",
        "gather": "[acorns|pine cones|berries]",
        "fine": "[sunny|quiet|bright|misty]",
        "falls": "rain",
        "spots": "[behind a fallen tree|under a pile of leaves|inside a hollow oak|between the roots"
        "|beside the mushrooms|among the ferns]",
        "elder": "the wise owl",
        "ehe": "she",
    },
    {
        "land": "[on a farm among green hills|on a small farm|on a farm at the end of a long road]",
        "home": "[a red house beside the barn|a cottage next to the mill|a farmhouse with blue windows]",
        "walk": "[across the fields|past the barn|along the hedge]",
        "dest": "[the orchard|the mill|the meadow]",
        "creature": "[lamb|duckling|chick]",
        "guide": "[the sound of the cow bells|the light in the barn]",
        "gather": "[apples|daisies|plums]",
        "fine": "[sunny|warm|bright|golden]",
        "falls": "rain",
        "spots": "[behind the barn|under the hay|inside the old cart|beside the duck pond|among the pumpkins"
        "|under the apple tree]",
        "elder": "the farmer",
        "ehe": "she",
    },
    {
        "land": "[in a little town with narrow streets|in a busy town|in an old town with a tall clock]",
        "home": "[a tall house on the market square|a flat above the bakery|a yellow house at the corner]",
        "walk": "[through the streets|across the market square|past the shops]",
        "dest": "[the park|the library|the bakery]",
        "creature": "[pigeon|kitten|sparrow]",
        "guide": "[the sound of the bells|the lamps of the market square]",
        "gather": "[chestnuts|autumn leaves|feathers]",
        "fine": "[sunny|busy|bright|grey]",
        "falls": "rain",
        "spots": "[behind the fountain|under a bench|beside the clock tower|on the library steps"
        "|between the stalls|inside the bakery]",
        "elder": "the baker",
        "ehe": "he",
    },
    {
        "land": "[high in the mountains|in a valley between two mountains|at the foot of a great mountain]",
        "home": "[a stone hut|a house with a steep roof|a cabin near the waterfall]",
        "walk": "[up the steep path|across the meadow|over the stone bridge]",
        "dest": "[the waterfall|the top of the hill|the high meadow]",
        "creature": "[young goat|marmot|small eagle]",
        "guide": "[the sound of the goat bells|the smoke of the chimneys]",
        "gather": "[wild flowers|blueberries|shiny stones]",
        "fine": "[sunny|clear|bright|cool]",
        "falls": "rain",
        "spots": "[behind a big rock|under the pine trees|beside the waterfall|inside the little cave"
        "|on the bridge|among the flowers]",
        "elder": "the old shepherd",
        "ehe": "he",
    },
    {
        "land": "[beside a slow river|on the bank of a wide river|in a village where two rivers met]",
        "home": "[a house with a little jetty|a green boat on the water|a cottage under the willows]",
        "walk": "[along the river bank|over the bridge|through the reeds]",
        "dest": "[the boat house|the water meadow|the mill]",
        "creature": "[duckling|frog|young swan]",
        "guide": "[the sound of the water wheel|the lamps on the bridge]",
        "gather": "[smooth stones|reeds|water lilies]",
        "fine": "[sunny|warm|bright|foggy]",
        "falls": "rain",
        "spots": "[under the bridge|behind the willow|among the reeds|beside the water wheel"
        "|inside an old boat|on the little island]",
        "elder": "the ferryman",
        "ehe": "he",
    },
    {
        "land": "[in a village where the snow was deep|in the far north|in a snowy valley]",
        "home": "[a log house with a warm stove|a red cabin|a small house with a snowy roof]",
        "walk": "[through the deep snow|across the frozen lake|between the white trees]",
        "dest": "[the sledging hill|the wood shed|the ice house]",
        "creature": "[snow hare|white owl|small deer]",
        "guide": "[the smell of wood smoke|the light in the window]",
        "gather": "[fir cones|icicles|frozen berries]",
        "fine": "[cold|clear|bright|frosty]",
        "falls": "snow",
        "spots": "[behind the sledge|under a snowy fir|beside the frozen pond|inside the wood shed"
        "|next to the snowman|under the bench]",
        "elder": "the stove maker",
        "ehe": "he",
    },
    {
        "land": "[near an old castle|in a village below a castle|in the garden of a great castle]",
        "home": "[a round tower|a cottage beside the castle gate|a house with a rose garden]",
        "walk": "[through the rose garden|over the drawbridge|along the castle wall]",
        "dest": "[the castle gate|the tall tower|the orchard]",
        "creature": "[dove|swallow|kitten]",
        "guide": "[the sound of the castle bell|the torches on the wall]",
        "gather": "[rose petals|feathers|walnuts]",
        "fine": "[sunny|warm|bright|cloudy]",
        "falls": "rain",
        "spots": "[behind the castle wall|under the drawbridge|beside the well|inside the stable"
        "|among the roses|on the tower stairs]",
        "elder": "the old gardener",
        "ehe": "she",
    },
)
FRIENDSHIP = (
    "[{His} best friend was {fintro}.|{He} had a good friend, {fintro}."
    "|Next door lived {fintro}, and the two were [best|good] friends.]"
)
OPENINGS = (
    "[Once upon a time there [was|lived]|Once there was|Long ago there was] {intro} {land}. "
    "{n} was {trait} and {habit}.",
    "[Once upon a time|Long ago|Many years ago], {intro} lived {land}. {He} was {trait} and {habit}.",
    "{Land} lived {intro}. {He} was {trait} and {habit}.",
    "{n} was a {trait} {kind}. {He} lived {land}, in {home}.",
    "This is the story of {n}, a {trait} {kind} who lived {land}. {n} shared {home} with {his} {kin}.",
    "There was once a {trait} {kind} who was called {n}. {He} lived with {his} {kin} in {home}.",
    "{n} the {kind} lived in {home}, {land}. {He} {habit}.",
    "One day, {intro} moved into {home}, {land}. {He} was {trait} and {habit}.",
    "Have you heard of {n}, the {trait} {kind}? {He} lived {land} and {habit}.",
    "{saying}, {n}'s {kin} used to say. {n} was a {trait} {kind} who lived {land}.",
    '"{saying}," said {elder} to everyone who would listen. {n}, a {trait} {kind}, did.',
)
PLOTS = (
    # lost and found
    """{friendship} {n} had a {colour} {toy} that [{he} loved more than anything|{his} {kin} had given
    {him}|{he} took everywhere]. One {fine} [morning|afternoon|day], the {toy} was gone.

    {He} looked {spot1}, but it was not there. {He} looked {spot2}, but [there was only an old shoe|it
    was not there either|there was nothing at all]. "[Oh no|Oh dear]! Where is my {toy}?" [cried|said]
    {n}. {f} [heard {him} and came running|came at once]. "Do not [worry|be sad|cry]," said {f}. "[We
    will look for it together|I will help you to find it|Two of us will find it sooner]." They asked
    {elder}, but {ehe} had not seen it.

    [At last|Just before sunset|Then], {f} looked {spot3} and [laughed|gave a shout|smiled]. "[Here it
    is|Look|Come and see]!" There was the {toy}, and [a {creature} was asleep on it|a {creature} was
    playing with it|it was only a little wet]. {n} hugged {f} and said, "[Thank you|You are a true
    friend|I am so glad]!" From that day on, {n} [took good care of the {toy}|always knew where the {toy}
    was].""",
    # a fear overcome
    """{friendship} But there was one thing that {n} did not like at all: {he} was afraid of {fear}.
    "[Everyone is afraid of something|It is not bad to be afraid]," said {his} {kin}.

    One [evening|day], {elder} came [running|hurrying] {walk}. "[Come quickly|Help]!" {ehe} called.
    [There was no time to lose:|Something had happened:] {trouble}. {n}'s heart [beat like a drum|beat
    very fast]. {He} [took a deep breath|counted to ten|thought of {his} friend]. Then {step}. At last
    {he} {rescue}.

    "You came!" said {f}. "Were you not afraid?" "[Yes, I was|I was very afraid]," said {n}, "but [you
    needed me|I wanted to help you more]." [{f} smiled and took {his} {hand}.|They both laughed.] Since
    that [day|evening], {n} was [no longer afraid of {fear}|only a little afraid of {fear}].""",
    # sharing
    """One {fine} [morning|day], {n} packed a {food} and walked {walk} to {dest}. [{He} was looking
    forward to a long rest.|{He} was very hungry.]

    {Spot1} sat {fintro}. "[Why do you look so sad|What is the matter]?" asked {n}. "[I have not eaten
    since yesterday|I forgot my lunch|I have lost my lunch]," said {f} [quietly|in a small voice]. {n}
    looked at the {foodnoun}. It was not much. Then {he} [divided it|made two halves] and gave {f} the
    [bigger|larger] part. They ate together and [talked about the clouds|told each other funny
    stories|watched a {creature}].

    The next day, there was a [basket of {gather}|big basket] in front of {n}'s door. "For my [new|kind]
    friend," said the note, "[from|with love from] {f}." {n} [laughed with joy|smiled all day]. [A little
    {foodnoun} had made a good friend.|Something that is shared tastes twice as good.]""",
    # building something
    """{friendship} One {fine} [morning|day], the two wanted to build a {project}. They took {parts} and
    worked [until noon|for hours|all morning].

    But when they tried it, the {project} {fails}. "[It will never work|We cannot do it]," [sighed|said]
    {f}. "[Let us try again|We can do it better]," said {n}. They asked {elder} for help. {Ehe} looked at
    the {project} and [nodded|smiled]. "[You have made a good start|It is almost right]," {ehe} said.
    "Tie it [more tightly|with a second knot] and [do not hurry|take your time]."

    So they began again. {n} held the pieces and {f} tied the knots. [In the evening|The next day], they
    tried once more, and this time the {project} {works}! [{f} danced with joy.|"Hurray!" cried {f}.|"We
    did it!" cried {n}.] "{saying}," said {elder}.""",
    # caught by the weather
    """{friendship} One {fine} [morning|day], {n} and {f} went to {dest} to look for {gather}. They sang
    as they walked {walk}.

    [Suddenly|All at once] the sky grew dark and {falls} began to fall. "[We must find a dry place|Quick,
    we must hide]!" called {n}. They ran [as fast as they could|{walk2}] and hid {spot1}. It was
    [cold|wet and cold] there, and {f} began to [shiver|tremble]. {n} gave {fhim} {his} {colour} scarf
    and told {fhim} a [funny|long] story. {f} [laughed|listened] and forgot the [cold|weather].

    [After a while|Then] they heard a voice. It was {elder} with [a lantern|a big umbrella]. "[There you
    are|I have found you]!" said {elder}. "Come home with me. There is hot [soup|tea|milk] on the stove."
    [Soon they sat by the fire|Soon they were warm and dry], and {n} said, "[It was a good day after
    all|The best days are the ones with a surprise].\"""",
    # somebody new
    """One {fine} [morning|day], {n} saw somebody new {spot1}. It was {fintro}, who had [just moved
    there|come from far away]. {f} sat all alone and [looked at the ground|said nothing|drew lines in the
    dust].

    "[Hello|Good morning]! [Would you like to play|Do you want to come with me]?" asked {n}. {f} [only
    shook {fhis} head|did not answer]. {n} thought for a while. Then {he} fetched {his} {colour} {toy}
    and put it down between them. {f} looked at it, first with one eye and then with both. "[It is
    beautiful|I had one like this at home]," {fhe} said [softly|at last].

    [Soon|After that] they were [laughing and playing|playing together], and {f} knew a [new game|song]
    that {n} had never heard. When the sun went down, {f} [laughed|smiled] for the first time. "[Will you
    come again tomorrow|Are we friends now]?" {fhe} asked. "[Of course|Yes, of course]!" said {n}. And
    [so it was|that is how it began].""",
    # a small creature in need
    """One {fine} [morning|afternoon|day], {n} walked {walk} and heard a [faint|sad|small] sound. {Spot1}
    sat a {creature} that [had hurt its leg|could not walk|was weak and hungry].

    {n} [picked it up gently|wrapped it in {his} scarf] and carried it home. "[What shall I do|What does
    it need]?" {he} asked {his} {kin}. "[It needs warmth and rest|Give it water and keep it warm]," said
    {his} {kin}. So {n} made a [soft bed|nest] in a box and sat beside it [all night|until morning]. {f},
    {his} friend, brought [fresh water|something to eat] every day.

    After [a week|ten days|seven days], the {creature} was strong again. {n} and {f} took it back to the
    place {spot1}. The {creature} looked at them [once more|for a long time], and then it was gone. {n}
    was [a little sad|sad and happy at the same time]. "[It will not forget you|You have done well],"
    said {f}. And every [spring|year], a {creature} came to {n}'s window.""",
    # the race
    """{friendship} Every year there was a great {race}, and everyone came to see it. {n} had
    [practised|trained] for weeks. "[This time I will win|I am going to win]," {he} told {f}.

    When {elder} [rang the bell|gave the sign], they all started. {n} was [faster than all the others|the
    first to reach {dest}]. But then {he} heard a cry. {f} had fallen and could not get up. {n} looked at
    the finish, and {he} looked at {f}. Then {he} [turned around|ran back] and [held out {his}
    {hand}|helped {fhim} to {fhis} feet]. "[You will lose|Go on without me]!" said {f}. "[Then we will
    lose together|A race is only a race]," said {n}.

    They came in last, but everyone [clapped|cheered] as loudly as they could. {Elder} gave {n} a
    [ribbon|medal] and said, "[This is for the kindest of all|You have won more than a race]." {n}
    [cut|broke] it in two, and {f} got the other half.""",
    # the surprise
    """It was {n}'s birthday, but nobody said a word about it. {His} {kin} was [busy|in a hurry].
    {friendship} But {f} was nowhere to be found.

    {n} walked {walk} and felt [sad|very lonely]. {He} asked {elder}, "[Do you know what day it is|Is
    this not a special day]?" "[It is a day like any other|I do not know]," said {elder} and [hurried
    away|looked the other way]. {n} [sighed|kicked a stone]. In the evening {he} went home. The house was
    dark. [Very slowly|Quietly], {he} opened the door.

    "Surprise!" shouted {f}. There were [lanterns|candles|flowers] everywhere, and on the table stood a
    big cake. {f} gave {him} a {colour} {toy}. "[Did you think that we forgot you|We have been busy all
    day]?" {fhe} asked. {n} [laughed until {he} cried|did not know what to say]. It was the best birthday
    of all.""",
    # the way home
    """{friendship} One {fine} afternoon, the two went out to look for {gather}. "[Do not go too far|Be
    back before it is dark]," said {n}'s {kin}. But [{spot1} there were a few {gather}|there were some
    {gather} {spot1}], and even more {spot2}, and so they went on and on.

    When the basket was full, it was [getting dark|almost dark]. "[Which way did we come|Where are we]?"
    asked {f}. {n} did not know. Everything looked [strange|the same]. {f} began to [cry|sniff]. "[Be
    very quiet|Wait a moment]," said {n}. "[If we keep still, we may notice something|Let us stop and
    think]." They stood still, {hand} in {hand}. And then they noticed it: {guide}!

    They followed it {walk}, step by step, until they saw {his} home. {His} {kin} [was standing at the
    door|came to meet them] and hugged them both. "[We went too far|I am sorry]," said {n}, "but [we kept
    calm|we stayed together]." Then they [emptied the basket|showed what they had found] and told the
    whole story.""",
    # the seed
    """One day {elder} gave {n} a tiny seed. "[Take good care of it|Plant it and be patient]," {ehe}
    said. {n} planted it in [a pot|a sunny place] and gave it water every [morning|evening].

    [One week went by|Many days went by], and nothing happened. {friendship} "[Perhaps it is only a
    stone|Nothing will ever grow there]," said {f}. But {n} [did not give up|kept on giving it water].
    {He} even [sang to it|told it stories]. Then, one {fine} morning, there was a [small|tiny] green
    leaf. "[Look|Come and see]!" {he} shouted. {f} [came running|could hardly believe it].

    The leaf became a stem, and by the end of summer it was the [finest|biggest] {plant} far and wide.
    {Elder} came to see it and [smiled|nodded]. "{saying}," {ehe} said. {n} gave {f} a seed of {fhis}
    own, and the next year there were two.""",
    # telling the truth
    """One {fine} [morning|day], {n} was playing with {his} {colour} {toy} in the house. {He} had been
    told not to do it. There was a loud crash, and {his} {kin}'s {fragile} lay on the floor in [pieces|a
    hundred pieces].

    {n} hid the pieces {spot1}. All day long {he} [could not eat|could not laugh|had a stone in {his}
    stomach]. "[What is the matter with you|Why are you so quiet]?" asked {f}, {his} friend. {n} told
    {fhim} everything. "[You have to tell the truth|It will feel better when you have told it]," said
    {f}. "I will come with you."

    So they went together. "[I have broken your {fragile}|It was me]," said {n}, "and I am sorry." {His}
    {kin} was silent for a moment. "[I am sad about the {fragile}|It was old]," {his} {kin} said, "but I
    am [glad|happy] that you told me." They [glued the pieces together|mended it together]. It was not
    [perfect|as beautiful as before], but {n} felt [as light as a feather|happy again].""",
    # the noise at night
    """One night, {n} woke up and heard {noise}. It stopped, and then it came again. {He} pulled the
    blanket over {his} head. [Was it a ghost|Was it a monster]?

    {friendship} That night {f} was staying with {him}. "[Are you awake|Do you hear that]?" whispered
    {n}. "Yes," whispered {f}. "[Let us go and see|We have to find out what it is]." They lit a
    [candle|lantern] and went out on tiptoe. They looked {spot1}. Nothing. They looked {spot2}. Nothing.
    [But the sound was getting louder|The sound came nearer and nearer]. {n} held up the light, and then
    they both [laughed|began to laugh]. It was {cause}.

    They {mend}. "[We were afraid of so little|So that was our monster]!" said {f}. Then they crept back
    to bed, and [{n} fell asleep at once|soon they were both asleep]. [In the morning they told {elder},
    and {ehe} laughed too.|A sound is much smaller when you know what it is.]""",
    # catching the moon
    """One clear night, {n} saw the moon in a [puddle|bucket of water|pond]. "[I will catch it|I am going
    to take it home]!" {he} said. {He} fetched a net and [tried again and again|tried all evening], but
    the moon always [slipped away|broke into a thousand pieces].

    {friendship} "[What are you doing|What are you fishing for]?" asked {f}. "[I want to have the moon|I
    am catching the moon] for my room," said {n}. {f} [looked up|pointed to the sky]. "But then it would
    be dark {spot1}, and dark {spot2}, and {elder} would not find the way home." {n} had not thought of
    that.

    {He} put down the net and sat beside {f}. Together they watched how the moon shone [on the roofs|on
    everything]. "[It is nicer up there|It belongs to everyone]," said {n}. When {he} came home, the moon
    was looking [in at the window|through the window], and {his} room was full of [silver light|light].""",
    # a quarrel
    """{friendship} One {fine} [morning|day], the two found a {colour} {toy} {spot1}. "[I saw it first|It
    is mine]!" said {n}. "No, [I saw it first|it is mine]!" said {f}. They pulled at it from both sides,
    until {f} let go and ran away.

    Now {n} had the {toy} all to {himself}. But it was no fun to be alone. {He} sat {spot2} and
    [sighed|thought]. At the same time, {f} sat {spot3} and was [sad|unhappy] too. {Elder} came by and
    said to {n}, "[A {toy} cannot laugh with you|You look as if you have lost something]." {n} [nodded
    slowly|looked at the ground].

    {He} took the {toy} and went to {f}. "[I am sorry|I was wrong]," {he} said. "[You can have it|It is
    yours]." "[I am sorry too|No, we will share it]," said {f}. So [{n} had it on Mondays and {f} had it
    on Tuesdays|{n} had it in the morning and {f} had it in the afternoon], and on Sundays they played
    with it together.""",
    # learning something
    """{friendship} {f} could {skill}, and {n} wanted to learn it too. The first time {he} tried,
    {first}. The second time was [no better|even worse]. "[I will never learn it|It is too hard for me],"
    said {n} and sat down {spot1}.

    {Elder} had seen [everything|it all]. "[Do you see the {creature} over there?|Look at that
    {creature}!]" {ehe} said. "It fell down many times before it [could stand|learned to walk]. Every
    effort moves you [forward|a little forward], even when you do not [see|feel] it." {n} [thought about
    this|nodded] and stood up again. {f} showed {him} how to do it, [slowly|step by step]. {He} tried on
    [Monday, and {he} tried on Tuesday|the first day, and {he} tried on the second day], and [every day
    it was a little better|every day {he} got a little further].

    [At the summer fair|One month later|At the end of the year], {n} {later}. "[Bravo|Hurray]!"
    [called|shouted] {elder}. "[Who taught you that|How did you do it]?" asked {his} {kin}. {n}
    [smiled|laughed]. "[My friend {f}|{f}]," {he} said, "and a {creature}.\"""",
    # a present made by hand
    """It was almost {his} {kin}'s birthday, and {n} had no money for a present. {friendship} "[What can
    I give|What shall I do]?" asked {n}. "[Something that you have made|It does not have to cost
    anything]," said {f}.

    So they went to {dest} and looked for {gather}. They found some {spot1}, and some more {spot2}.
    {Elder} gave them a [piece|bit] of [string|ribbon] and a little [glue|paint]. All [afternoon|day]
    they sat {spot3} and worked, and in the evening they had made a {gift} out of {gather}. [It was a bit
    crooked|One side was longer than the other], but it was [beautiful|colourful].

    The next morning, {n} [put it on the table|held it out with both {hand}s]. {His} {kin} looked at it
    for a long time. "[Did you make this yourself|Is this for me]?" asked {his} {kin}. "[{f} helped me|We
    made it together]," said {n}. "[It is the finest present of all|I have never had a better one]," said
    {his} {kin}, and it hung [over the door|by the window] for many years.""",
)
ENDINGS = (
    "",
    "",
    "{n} [never forgot it|often thought of it|still likes to tell this story].",
    "And if you [ever come to|visit] {dest}, you may [still see|meet] {n} and {f} there.",
    "{saying}, {n} thought, and [it was true|smiled].",
    "From then on, {n} and {f} [were never far apart|met every day|were the best of friends].",
    "{n} and {f} [still talk|still laugh] about it.",
    "[And that is the end of the story.|That is how it was.]",
)


def pick(rng: random.Random, choices: Sequence[T]) -> T:
    """One of the choices; random() is the one method whose numbers Python promises to keep."""
    return choices[int(rng.random() * len(choices))]


def shuffled(rng: random.Random, choices: Iterable[str]) -> list[str]:
    """The choices in random order."""
    return [choice for _, choice in sorted((rng.random(), choice) for choice in choices)]


def options(template: str) -> list[str]:
    """What a template of one bracket chooses from."""
    return template.strip("[]").split("|")


def expand(rng: random.Random, template: str) -> str:
    """The template with every `[a|b]` replaced by one of its alternatives, innermost first."""
    while "[" in template:
        template = INNERMOST.sub(lambda match: pick(rng, match[1].split("|")).strip(), template)
    return template


def characters(rng: random.Random) -> Bundle:
    """Hero and friend, either way round: their names, pronouns and kinds, and the hero's relative."""
    roles = list(zip(PRONOUNS, pick(rng, PAIRS).split(), strict=True))
    (he, hero), (fhe, friend) = roles if rng.random() < 0.5 else reversed(roles)
    (n, kind, kin), (f, fkind, _) = hero.split("/"), friend.split("/")
    return {
        **PRONOUNS[he],
        **{f"f{slot}": word for slot, word in PRONOUNS[fhe].items()},
        "n": n,
        "f": f,
        "kind": kind,
        "kin": kin,
        "hand": "hand" if kind in ("girl", "boy") else "paw",
        "intro": expand(rng, f"a [little|young|small] {kind} called {n}"),
        "fintro": expand(rng, f"[a|a|a young] {fkind} called {f}"),
    }


def surroundings(rng: random.Random) -> Bundle:
    """One setting: its places, three hiding places, two different walks, somebody to ask."""
    setting = pick(rng, SETTINGS)
    spot1, spot2, spot3 = shuffled(rng, options(setting["spots"]))[:3]
    walk, walk2 = shuffled(rng, options(setting["walk"]))[:2]
    places = {slot: expand(rng, words) for slot, words in setting.items()}
    nearby = {"spot1": spot1, "spot2": spot2, "spot3": spot3, "walk": walk, "walk2": walk2}
    return places | nearby


def casting(rng: random.Random) -> Bundle:
    """Every slot of one story."""
    cast = characters(rng) | surroundings(rng)
    bundles = [WORDS, *(pick(rng, table) for table in (TRAITS, PROJECTS, FEARS, NOISES, SKILLS))]
    for bundle in bundles:
        cast |= {slot: expand(rng, words).format_map(cast) for slot, words in bundle.items()}
    cast["foodnoun"] = cast["food"].split(" of ")[-1].split()[-1]
    return cast | {slot.capitalize(): words[:1].upper() + words[1:] for slot, words in cast.items()}


def polished(text: str) -> str:
    """The text with single spaces, a capital at every sentence's start, and "an" before vowels."""
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r'((?:^|[.!?] |\n)"?)([a-z])', lambda match: match[1] + match[2].upper(), text)


def story(rng: random.Random) -> str:
    """One story: three or four paragraphs of ASCII, about 850 characters."""
    cast = casting(rng)
    template = " ".join(pick(rng, part) for part in (OPENINGS, PLOTS, ENDINGS))
    template = template.replace("{friendship}", FRIENDSHIP)
    return polished(expand(rng, template).format_map(cast))


def stories(seed: int, count: int) -> Iterator[str]:
    """`count` stories, always the same ones for a seed, in every Python version."""
    rng = random.Random(seed)
    return (story(rng) for _ in range(count))


def main() -> None:
    """Print stories, a blank line between them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    print("\n\n".join(stories(args.seed, args.count)))


if __name__ == "__main__":
    main()
