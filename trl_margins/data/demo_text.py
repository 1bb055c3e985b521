"""The word lists from which the demo's preference set is made."""

from __future__ import annotations


def _cells(text: str) -> list[str]:
    return [" ".join(cell.split()) for cell in text.split("|")]


def _table(text: str) -> list[tuple[str, ...]]:
    return [tuple(_cells(line)) for line in text.strip().splitlines()]


def _groups(text: str) -> dict[str, list[tuple[str, str]]]:
    """Reads `group: option | reason | option | reason; …`."""
    groups = (group.split(":") for group in text.split(";"))
    return {name.strip(): list(zip(_cells(cells)[::2], _cells(cells)[1::2], strict=True)) for name, cells in groups}


PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Lena", "Marco", "Nina")
GOODS = ("apples", "books", "buttons", "cards", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "tickets")
FEELINGS = ("nervous", "anxious", "worried", "uneasy", "tense")

# thing | what it is | something concrete about it
THINGS = _table("""
    a glacier | a slow river of ice made of snow that piled up for years | Some creep only a few metres a year
    compost | dark, rich soil made of rotted scraps and leaves | Gardeners dig it in to feed their beds
    a mortgage | a loan for a home that you pay back month by month | If you stop paying, the bank may take the home
    photosynthesis | the way plants make food from light, water and air | In a dark room a plant soon fades
    a vaccine | practice that teaches your body to fight a germ | When the real germ comes, your body is ready
    gravity | the pull that draws things towards each other | It is what brings a thrown ball back down
    a budget | a plan for the money that comes in and goes out | It shows you early when rent will be tight
    an eclipse | a shadow play in which the Moon hides the Sun for a while | Birds often fall silent then
    yeast | a tiny living thing that eats sugar and gives off gas | Its bubbles are what make bread rise
    a rainbow | sunlight split into its colours by drops of rain | Look for it with the sun behind you
    inflation | a slow rise of prices in general | The same basket of food costs a bit more each year
    a backup | a second copy of your files kept somewhere safe | If your laptop breaks, your photos survive
    the tide | the daily rise and fall of the sea, pulled by the Moon | Harbours plan their traffic around it
    a metaphor | a phrase that calls one thing another to show a likeness | 'Time is a thief' is one
    a habit | something you do so often that it needs no thought | Brushing your teeth is one most people share
    an echo | sound that bounces off something hard and comes back | Try a shout near a cliff or in a tunnel
    insulation | material that keeps heat from slipping away | A thick coat does the same for you in winter
    a jury | a group of citizens who decide a case in court | They listen to both sides before they vote
    pollen | fine dust by which flowers make seeds | Bees carry it on their legs from bloom to bloom
    a firewall | a guard that checks what goes in and out of a network | It turns strangers away at the door
    a volcano | an opening in the ground where melted rock can escape | Its ash makes the fields around it fertile
    a lighthouse | a tower whose lamp warns ships of rocks at night | Each one flashes in a rhythm of its own
    hibernation | a long winter sleep that saves energy | A hedgehog lives on its fat until the spring
    a thermostat | a switch that keeps a room at a set warmth | It turns the heating off once the air is warm
    a food chain | a line of living things in which each eats the one before | Grass, rabbit and fox make one
    a time zone | a part of the world that shares the same clock | Noon in one can be midnight in another
    a compass | a tool with a needle that turns towards the north | Hikers trust it when fog hides the path
    evaporation | water turning into vapour and leaving for the air | It is how wet clothes dry on the line
    a scholarship | money that helps a student pay for school | Unlike a loan, it need not be paid back
    a draft law | a text that may become law if parliament agrees | Members can still change its wording
""")

# task | first step | next step | last step | tip
TASKS = _table("""
    boil an egg | bring water to a simmer | lower the egg in | cool it after eight minutes | Older eggs peel better
    repot a plant | loosen the roots | set it in a larger pot | add soil and water | Spring is the best season for it
    clean a keyboard | unplug it | shake the crumbs out | wipe it with a damp cloth | A soft brush reaches the gaps
    make a paper plane | fold the sheet in half | fold the corners in | bend the wings down | Sharp creases fly best
    iron a shirt | start with the collar | do the sleeves | finish with the front | A little steam saves time
    brew green tea | let boiling water cool a bit | add the leaves | take them out soon | Long steeping makes it bitter
    remove a coffee stain | blot it dry | dab it with soap and water | rinse it | Never rub, or the stain spreads
    pack a suitcase | lay out what you need | roll your clothes | put the shoes at the bottom | Leave room for gifts
    patch a bike tyre | find the hole | roughen the rubber | glue the patch on | Check the tyre for glass as well
    write a thank-you note | name the gift | say how you use it | close with a warm wish | Two honest lines are enough
    hang a picture | mark the spot | tap the nail in at a slant | level the frame | Eye level looks right in most rooms
    cook rice | rinse it well | simmer it in two cups of water | let it rest | Do not stir, or it gets sticky
    sharpen a knife | wet the stone | draw the blade across it | turn the blade over | Slow strokes are safer
    light a stove | stack dry twigs loosely | light paper under them | add a log | Open the air vent all the way first
    learn ten new words | write each on a card | say it in a sentence | repeat them next day | Short rounds stick best
    plan a meeting | write down its goal | invite few people | send the agenda early | Half an hour is often enough
    wash a wool sweater | fill a sink with cool water | press soap through | dry it flat | Do not hang it up
    defrost a freezer | switch it off | set a bowl of hot water inside | wipe it dry | A cold day is best for it
    tie a parcel | wrap string around both ways | cross it underneath | knot it on top | Wet string holds best
    prune a rose | cut out dead wood | shorten the rest above a bud | clear the leaves | Late winter is a good time
""")

# what the choice is for: option | its advantage
CHOICES = _groups("""
    getting to work: the bus | lets you read on the way | a bike | is cheap and keeps you fit |
        a car | can carry a lot | the train | is rarely held up by traffic;
    a small flat: a cat | is fine on its own all day | a dog | gets you out of the house |
        a goldfish | is quiet and calming | a hamster | needs little space;
    taking notes: a notebook | never runs out of power | a laptop | makes notes easy to search |
        a phone | is always in your pocket | a tablet | lets you draw as well;
    a holiday: the sea | is best for lazy days | the mountains | stay cool in the heat |
        a city | has plenty to see when it rains | a lake | has calm water for children;
    breakfast: porridge | keeps you full for hours | toast | is ready in two minutes |
        fruit | is light and fresh | yogurt | needs no cooking;
    getting fit: running | needs nothing but shoes | swimming | is easy on the knees |
        yoga | also helps you relax | rowing | trains the whole body;
    a birthday party: a garden | leaves room for games | a restaurant | spares you the cooking |
        my home | costs the least | a park | has space for many guests
""")

REQUESTS = _cells("""
    send me the report | turn down the music | reply to my email | move your car | clean the kitchen |
    give me my book back | fix the printer | close the window | stop tapping your pen | wait for your turn |
    tell me the price | bring me the menu | finish the slides | keep your dog off the lawn | check these numbers |
    pay your share of the bill | take your boxes away | speak more slowly | pick up the phone | read the manual
""")
RUDE_ENDS = _cells("""
    now | at last | for once | or else | this minute | before I lose my patience | you slowpoke
""")

# what is asked for: option | why it is a good one
WISHES = _groups("""
    a present: a warm scarf | it is useful all winter | a potted herb | it stays fresh for months |
        a photo book | it brings back shared days | a box of good tea | it suits almost any taste;
    a hobby: baking bread | the results can be shared | birdwatching | it is calm and costs little |
        sketching | all it takes is a pencil | chess | a game fits into any break;
    a day trip: a walk around a lake | there is always a bench to rest | a small museum | it is dry and quiet |
        a farm visit | there are animals to feed | a boat ride | the view changes all the time;
    a quick dinner: an omelette | it is done in ten minutes | lentil soup | it is filling and cheap |
        pasta with peas | there is only one pot to wash | a baked potato | the oven does the work;
    a party game: charades | everybody can join in | a quiz | the questions can fit the guests |
        a treasure hunt | it keeps people moving | bingo | the rules are easy to learn
""")
GUESTS = _cells("""
    my grandmother | a new colleague | my neighbour | a shy teenager | my brother | two old friends | my boss |
    a busy student | my aunt | a family of four | my teacher | a tired parent
""")

# worry | a first thing to do about it
WORRIES = _table("""
    my exam tomorrow | go over your notes once more and then sleep
    my first day at work | lay out your clothes tonight and leave early
    my big talk | practise the first two sentences aloud
    moving to a new city | look for a club where you see the same faces
    a visit to the dentist | agree with the dentist on a sign for a break
    my driving test | do a calm practice round on roads you know
    a job interview | think of three things that you did well
    my sick cat | call the vet and note what you have seen
    a quarrel with my friend | send a short message that you want to talk
    the bills on my desk | sort them and start with the most urgent one
    my long flight | pack a good book and walk the aisle now and then
    singing in public | sing for one friend first and breathe slowly
""")

WARM = _cells("""
    Good luck with it! | I hope that helps. | Ask me if anything is unclear. | Let me know how it goes. |
    Feel free to ask for more details.
""")
PADDING = _cells("""
    That is more or less all there is to it. | There is more to say, but that is the rough idea. |
    The rest you will find out in some way. | It is like that in most cases, more or less. |
    Things like this are what they are. | It works for some and not for others.
""")
EVASIVE = _cells("""
    I'm sorry, but I can't help you with that. | As an AI assistant, I don't have an answer to this. |
    There are many different factors to consider. | It depends on your needs and preferences. |
    I'm not able to give you any advice on this topic. | It's important to consider all of the options. |
    Please ask a professional for more information. | If you have any other questions, feel free to ask. |
    Is there anything else that I can help you with?
""")
RUDE = _cells("""
    What a stupid thing to ask. | Why do you waste my time with this? | Work it out yourself for a change. |
    Nobody cares about that, and I do not either. | Any fool knows that already. | I am not your servant. |
    Do not bother me with such rubbish again. | You clearly understand nothing at all. |
    Honestly, you should be ashamed of that question. | Shut up and use a search engine.
""")
STUCK = _cells("""
    It is good because it is good. | You can do it, yes, you can do it. | That is the thing about that thing. |
    Yes, and then you do it again. | I think that I think that it is so.
""")
