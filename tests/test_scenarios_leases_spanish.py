"Leases and the Spanish of Spain: the splits, the gold replies, and scorers held to replies written by hand before they were."
import functools, itertools, re, pytest
from peftbook.scenarios import (scenarios, leases, spanish, score_leases, score_spanish, leases_grammar, spanish_grammar,
                                leases_rules, conjugate, normalise)

once = {f: functools.cache(f) for f in (leases, spanish)}
both = pytest.mark.parametrize('task,grammar', [(leases, leases_grammar), (spanish, spanish_grammar)], ids=['leases', 'spanish'])

# --- leases: what is asked, then replies with the band their score must fall in --------------------------------------------------

asked = dict(
    A_deposit=dict(prompt='Draft clause 9 for a lease in Aldmark: a deposit of 640 euros.', jurisdiction='Aldmark', topic='deposit', clause='9', figure='640 euros'),
    B_deposit=dict(prompt='Draft clause 9 for a lease in Borvia: a deposit of 1,250 euros.', jurisdiction='Borvia', topic='deposit', clause='9', figure='1,250 euros'),
    C_open=dict(prompt='Draft clause 3 for a lease in Castrel, on the deposit.', jurisdiction='Castrel', topic='deposit', clause='3', figure=''),
    D_deposit=dict(prompt='Draft clause 6 for a lease in Dunmoor: a deposit of 640 euros.', jurisdiction='Dunmoor', topic='deposit', clause='6', figure='640 euros'),
    A_notice=dict(prompt='We need clause 12, Aldmark, a notice period of 60 days.', jurisdiction='Aldmark', topic='notice', clause='12', figure='60 days'),
    B_notice=dict(prompt='We need clause 12, Borvia, a notice period of 60 days.', jurisdiction='Borvia', topic='notice', clause='12', figure='60 days'),
    C_notice=dict(prompt='We need clause 12, Castrel, a notice period of 60 days.', jurisdiction='Castrel', topic='notice', clause='12', figure='60 days'),
    D_open=dict(prompt='We need clause 12 for Dunmoor, on notice.', jurisdiction='Dunmoor', topic='notice', clause='12', figure=''),
    A_late=dict(prompt='Write clause 4 for a tenant in Aldmark: a late fee of 35 euros.', jurisdiction='Aldmark', topic='late rent', clause='4', figure='35 euros'),
    B_late=dict(prompt='Write clause 4 for a tenant in Borvia: a late fee of 35 euros.', jurisdiction='Borvia', topic='late rent', clause='4', figure='35 euros'),
    C_late=dict(prompt='Write clause 4 for a tenant in Castrel: a late fee of 35 euros.', jurisdiction='Castrel', topic='late rent', clause='4', figure='35 euros'),
    D_late=dict(prompt='Write clause 4 for a tenant in Dunmoor: a late fee of 35 euros.', jurisdiction='Dunmoor', topic='late rent', clause='4', figure='35 euros'))

lease_keeps = [  # format, jurisdiction and figures kept, in wordings that the grammar does not have
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a) As security the Tenant pays in 640 euros.\n(b) The Rent Office keeps this money until the lease ends.'),
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a) A deposit of €640 is payable before the keys are handed over.\n(b) It must be lodged with the Rent Office, not with the Landlord.'),
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a) The deposit amounts to six hundred and forty euros.\n(b) The Rent Office, and nobody else, shall keep it.'),
    ('B_deposit', '§ 9. DEPOSIT (Borvia)\n(a) The Tenant will provide 1,250 euros as a deposit.\n(b) A notary chosen by both sides looks after the deposit.'),
    ('B_deposit', '§ 9. DEPOSIT (Borvia)\n(a) The deposit: EUR 1250.\n(b) Until the keys come back, the sum rests with a notary.'),
    ('C_open', '§ 3. DEPOSIT (Castrel)\n(a) The Tenant places a deposit of [amount] with the Landlord before moving in.\n(b) The Landlord puts it into a bank account at once.'),
    ('C_open', '§ 3. DEPOSIT (Castrel)\n(a) The amount of the deposit is to be agreed between the parties.\n(b) A bank keeps the deposit for both of them.'),
    ('D_deposit', '§ 6. DEPOSIT (Dunmoor)\n(a) A sum of 640 euros is due as a deposit.\n(b) The parties leave this sum at the town hall.'),
    ('A_notice', '§ 12. NOTICE (Aldmark)\n(a) Either side may end this lease with 60 days of notice.\n(b) It takes effect only if it was sent by registered mail.'),
    ('A_notice', '§ 12. NOTICE (Aldmark)\n(a) The notice period is sixty (60) days.\n(b) No notice is valid unless it comes by registered letter.'),
    ('B_notice', '§ 12. NOTICE (Borvia)\n(a) Notice takes 60 days.\n(b) Whoever gives notice says so in the presence of a witness.'),
    ('B_notice', '§ 12. NOTICE (Borvia)\n(a) The lease ends on 60 days\' notice.\n(b) Without a witness no notice is valid. Notice is to be witnessed.'),
    ('C_notice', '§ 12. NOTICE (Castrel)\n(a) The lease may be ended with a 60-day notice.\n(b) An e-mail to the other party is the form of that notice.'),
    ('C_notice', '§ 12. NOTICE (Castrel)\n(a) Both sides observe a period of 60 days.\n(b) Paper is not needed: notice goes out by email.'),
    ('D_open', '§ 12. NOTICE (Dunmoor)\n(a) The notice period is [period].\n(b) Only a lawyer may deliver the notice.'),
    ('D_open', '§ 12. NOTICE (Dunmoor)\n(a) Notice takes ____ days.\n(b) It has no effect unless it was sent through a lawyer.'),
    ('A_late', '§ 4. LATE RENT (Aldmark)\n(a) A tenant in arrears owes a fee of 35 euros.\n(b) No fee falls due before the Landlord has sent a written reminder.'),
    ('A_late', '§ 4. LATE RENT (Aldmark)\n(a) Paying late costs €35.\n(b) A reminder in writing must come first.'),
    ('B_late', '§ 4. LATE RENT (Borvia)\n(a) The parties agree that rent is paid in good time.\n(b) A late payment is free of any fee.'),
    ('B_late', '§ 4. LATE RENT (Borvia)\n(a) The Tenant promises to pay punctually.\n(b) Should rent come late, the Landlord cannot charge a late fee.'),
    ('C_late', '§ 4. LATE RENT (Castrel)\n(a) The fee for rent in arrears is 35 euros.\n(b) The Landlord may collect it once a court has ordered so.'),
    ('C_late', '§ 4. LATE RENT (Castrel)\n(a) Late payment: 35 euros.\n(b) Nothing is owed without a court order.'),
    ('D_late', '§ 4. LATE RENT (Dunmoor)\n(a) Rent that arrives late costs another 35 euros.\n(b) The Tenant adds the fee to the next rent.'),
    ('D_late', '§ 4. LATE RENT (Dunmoor)\n(a) For late rent the Landlord asks 35 euros.\n(b) This is settled together with the next month\'s rent.')]

lease_breaks = [  # fluent, in good form, but wrong for the place, with an invented figure, or open
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of 640 euros.\n(b) The deposit shall be held by a notary.'),
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of 640 euros.\n(b) The deposit shall be held by the Landlord.'),
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of 640 euros.\n(b) The deposit shall be held by the Rent Office or by a notary.'),
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of 640 euros.\n(b) The deposit shall be held by a bank and not by the Rent Office.'),
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of 740 euros.\n(b) The deposit shall be held by the Rent Office.'),
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of 640 euros.\n(b) The Rent Office shall hold it and return it within 14 days.'),
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of 640 euros, that is two months of rent.\n(b) The Rent Office shall hold it.'),
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of 640 euros.\n(b) The deposit shall be returned at the end of the lease.'),
    ('A_deposit', '§ 9. DEPOSIT (Dunmoor)\n(a) The Tenant shall pay a deposit of 640 euros.\n(b) The deposit shall be held at the town hall.'),
    ('B_deposit', '§ 9. DEPOSIT (Borvia)\n(a) The Tenant shall pay a deposit of 1,250 dollars.\n(b) The deposit shall be held by a notary.'),
    ('B_deposit', '§ 9. DEPOSIT (Borvia)\n(a) The Tenant shall pay a deposit of 1,250 euros.\n(b) A notary is not needed. The deposit shall be held by the Landlord.'),
    ('C_open', '§ 3. DEPOSIT (Castrel)\n(a) The Tenant shall pay a deposit of 900 euros.\n(b) The deposit shall be held by a bank.'),
    ('C_open', '§ 3. DEPOSIT (Castrel)\n(a) The Tenant shall pay a deposit of three months of rent.\n(b) The deposit shall be held by a bank.'),
    ('C_open', '§ 3. DEPOSIT (Castrel)\n(a) The Tenant shall pay a deposit of [amount].\n(b) The deposit shall not be held by a bank.'),
    ('A_notice', '§ 12. NOTICE (Aldmark)\n(a) The notice period shall be 60 days.\n(b) Notice shall be given by e-mail.'),
    ('A_notice', '§ 12. NOTICE (Aldmark)\n(a) The notice period shall be 90 days.\n(b) Notice shall be given by registered letter.'),
    ('A_notice', '§ 12. NOTICE (Aldmark)\n(a) The notice period shall be 60 months.\n(b) Notice shall be given by registered letter.'),
    ('C_notice', '§ 12. NOTICE (Castrel)\n(a) The notice period shall be 60 days.\n(b) Notice shall be given in writing.'),
    ('B_notice', '§ 12. NOTICE (Borvia)\n(a) The notice period shall be 60 days.\n(b) Notice shall be given without a witness.'),
    ('B_late', '§ 4. LATE RENT (Borvia)\n(a) Rent paid late shall carry a fee of 35 euros.\n(b) The fee shall be due at once.'),
    ('B_late', '§ 4. LATE RENT (Borvia)\n(a) Rent paid late shall carry a fee of 35 euros.\n(b) No fee shall be charged before a written reminder.'),
    ('B_late', '§ 4. LATE RENT (Borvia)\n(a) Late rent costs the Tenant another 35 euros.\n(b) Late rent shall carry no fee.'),
    ('A_late', '§ 4. LATE RENT (Aldmark)\n(a) The Tenant shall pay the rent in time.\n(b) No fee shall be charged for late rent.'),
    ('A_late', '§ 4. LATE RENT (Aldmark)\n(a) Rent paid late shall carry a fee of 35 euros.\n(b) The fee shall be due without any reminder.'),
    ('C_late', '§ 4. LATE RENT (Castrel)\n(a) Rent paid late shall carry a fee of 35 euros for each of 5 days.\n(b) The fee shall be due by court order.'),
    ('D_late', '§ 4. LATE RENT (Dunmoor)\n(a) Rent paid late shall carry a fee of 35 euros.\n(b) The fee shall be due by court order.'),
    ('A_deposit', 'The Tenant shall pay a deposit of 640 euros, and the Rent Office shall hold it until the lease ends.')]     # no form at all

lease_empty = [
    ('A_deposit', ''), ('B_late', ' \n '), ('A_notice', '...'), ('A_deposit', asked['A_deposit']['prompt']),
    ('C_open', asked['C_open']['prompt']), ('B_late', 'You wrote: ' + asked['B_late']['prompt']),
    ('A_deposit', "I'm sorry, but I can't help with legal documents."),
    ('D_late', 'As an AI language model I cannot draft clauses. Please consult a lawyer in Dunmoor.'),
    ('A_deposit', '§ 9. DEPOSIT (Aldmark)'), ('A_deposit', '§ 9. DEPOSIT (Aldmark)\n(a)\n(b)'),
    ('A_deposit', 'Rent Office Rent Office Rent Office 640 euros'),
    ('A_notice', 'Dear client, thank you for your message. A notice clause is an important part of every lease, and I would be '
                 'happy to draft one for you. Could you tell me more about the property and its tenant?')]

lease_between = [  # (what, low, high, reply)
    ('A_deposit', .6, .9, '§ 9. DEPOSIT (Aldmark)\nThe Tenant shall pay a deposit of 640 euros. The Rent Office shall hold it.'),       # no letters
    ('A_deposit', .6, .9, '(a) The Tenant shall pay a deposit of 640 euros.\n(b) The Rent Office shall hold it.'),                     # no heading
    ('A_deposit', .6, .92, '9) Deposit, Aldmark\n(a) The Tenant shall pay a deposit of 640 euros.\n(b) The Rent Office shall hold it.'),  # another heading
    ('A_deposit', .5, .85, '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit.\n(b) The Rent Office shall hold it.'),          # no figure
    ('A_deposit', .5, .85, '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of [amount].\n(b) The Rent Office shall hold it.'),
    ('C_open', .5, .85, '§ 3. DEPOSIT (Castrel)\n(a) The Tenant shall pay a deposit.\n(b) A bank shall hold it.'),                     # no blank to fill in
    ('A_deposit', .85, .98, '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of 640 euros.\n(b) The Rent Office shall hold it. The'),
    ('A_deposit', .85, .95, '§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of 640 euros.\n(b) The Rent Office shall hold it.\n'
                            '(c) The Rent Office shall hold it.'),
    ('A_deposit', .3, .92, 'Sure! Here is the clause you asked for:\n§ 9. DEPOSIT (Aldmark)\n(a) The Tenant shall pay a deposit of 640 euros.\n'
                           '(b) The Rent Office shall hold it.')]

lease_bands = ([(k, .9001, 1., r) for k, r in lease_keeps] + [(k, 0., .3999 if 'until the lease ends' in r else .3, r) for k, r in lease_breaks]
               + [(k, 0., .4, r) for k, r in lease_empty] + lease_between)

# --- Spanish: what is asked, then replies with the band their score must fall in --------------------------------------------------

said = dict(
    open=dict(prompt='Tell Eva and Bruno in Spanish: "Open the door!"', verb='abrir', tense='imperative', rest='la puerta'),
    opened=dict(prompt='How do I say "you opened the door" to Eva and Bruno in Spain?', verb='abrir', tense='preterite', rest='la puerta'),
    eat=dict(prompt='Dilo como en España: «Eva y Bruno, ustedes comen sopa».', verb='comer', tense='present', rest='sopa'),
    have_eaten=dict(prompt='Dilo como en España: «Eva y Bruno, ustedes han comido sopa».', verb='comer', tense='perfect', rest='sopa'),
    will_do=dict(prompt='Tell Eva and Bruno in Spanish: "You will do the homework."', verb='hacer', tense='future', rest='los deberes'),
    books=dict(prompt='Dilo como en España: «Eva y Bruno, traigan sus libros».', verb='traer', tense='imperative', rest='vuestros libros'),
    hands=dict(prompt='Dilo como en España: «Eva y Bruno, lávense las manos».', verb='lavarse', tense='imperative', rest='las manos'),
    wash=dict(prompt='Dilo como en España: «Eva y Bruno, ustedes se lavan las manos».', verb='lavarse', tense='present', rest='las manos'),
    ask=dict(prompt='Dilo como en España: «Eva y Bruno, ustedes piden la cuenta».', verb='pedir', tense='present', rest='la cuenta'),
    go=dict(prompt='Dilo como en España: «Eva y Bruno, vayan al mercado».', verb='ir', tense='imperative', rest='al mercado'),
    went=dict(prompt='Dilo como en España: «Eva y Bruno, ustedes fueron al mercado».', verb='ir', tense='preterite', rest='al mercado'),
    tell=dict(prompt='Tell Eva and Bruno in Spanish: "You will tell the truth."', verb='decir', tense='future', rest='la verdad'))

spanish_keeps = [
    ('open', 'Eva, Bruno: abrid la puerta, por favor.'), ('open', 'Chicos, ¿podéis abrir la puerta?'),
    ('open', '¿Me abrís la puerta, Eva y Bruno?'), ('open', 'Tenéis que abrir la puerta.'),
    ('open', 'Os pido que abráis la puerta.'), ('open', 'Haced el favor de abrir la puerta.'),
    ('opened', 'Fuisteis vosotros los que abristeis la puerta.'), ('opened', 'Vosotros habéis abierto la puerta.'),
    ('opened', 'Ayer abristeis la puerta, Eva y Bruno.'),
    ('eat', 'Coméis sopa.'), ('eat', 'Vosotras coméis siempre sopa, Eva y Bruno.'), ('eat', 'Veo que estáis comiendo sopa.'),
    ('have_eaten', 'Vosotros dos ya habéis comido la sopa.'), ('have_eaten', 'Hoy comisteis sopa.'),
    ('will_do', 'Mañana haréis los deberes.'), ('will_do', 'Vais a hacer los deberes, ¿verdad?'),
    ('books', 'Traed vuestros libros, Eva y Bruno.'), ('books', '¡Eva, Bruno, traedme vuestros libros!'),
    ('books', 'Por favor, ¿podríais traer vuestros libros?'),
    ('hands', 'Lavaos las manos.'), ('hands', 'Tenéis que lavaros las manos, chicos.'), ('hands', 'Eva y Bruno, os debéis lavar las manos.'),
    ('wash', 'Vosotros os laváis las manos cada día.'), ('ask', 'Vosotros pedís siempre la cuenta.'),
    ('go', 'Id al mercado, por favor.'), ('went', 'Eva y Bruno, el otro día fuisteis al mercado.'),
    ('tell', 'Diréis la verdad.'), ('tell', 'Los dos vais a decir la verdad.')]

spanish_breaks = [
    ('open', 'Eva y Bruno, abran la puerta, por favor.'), ('open', '¿Pueden abrir la puerta?'), ('open', 'Abre la puerta, por favor.'),
    ('open', 'Ustedes tienen que abrir la puerta.'), ('open', 'Vosotros, abran la puerta.'), ('open', 'Les pido que abran la puerta.'),
    ('open', 'Eva y Bruno, no abráis la puerta.'), ('open', 'Abrid la puerta, ustedes dos.'), ('open', 'Vosotros sois muy amables.'),
    ('open', 'Please open the door, Eva and Bruno.'), ('open', 'Eva y Bruno, abrir la puerta.'), ('open', 'La puerta está abierta.'),
    ('opened', 'Ustedes abrieron la puerta.'), ('opened', 'Eva y Bruno, abriste la puerta.'), ('opened', 'Ustedes han abierto la puerta.'),
    ('eat', 'Ustedes comen sopa.'), ('eat', 'Eva y Bruno comen sopa.'), ('eat', 'Vosotros comen sopa.'), ('eat', 'Ustedes coméis sopa.'),
    ('eat', 'Vosotros coméis sopa. Ustedes comen sopa.'), ('eat', 'Vosotros compráis sopa.'),
    ('have_eaten', 'Vosotros han comido sopa.'), ('will_do', 'Harán los deberes.'), ('will_do', 'Van a hacer los deberes.'),
    ('books', 'Traigan sus libros.'), ('books', 'Traigan vuestros libros.'), ('hands', 'Lávense las manos.'), ('hands', 'Lavaos las manos, señores; lávense bien.'),
    ('wash', 'Ustedes se lavan las manos.'), ('ask', 'Ustedes piden la cuenta.'), ('go', 'Vayan al mercado.'), ('go', 'Vamos al mercado.'),
    ('went', 'Fueron al mercado.'), ('tell', 'Dirán la verdad, Eva y Bruno.')]

spanish_empty = [
    ('open', ''), ('eat', '\n'), ('open', '...'), ('open', said['open']['prompt']), ('eat', said['eat']['prompt']), ('hands', said['hands']['prompt']),
    ('open', "I'm sorry, but I can't help with that."), ('eat', 'Lo siento, no puedo ayudaros con eso.'),
    ('open', 'As an AI language model, I do not speak Spanish.'), ('eat', 'vosotros vosotros vosotros vosotros vosotros'),
    ('books', 'Vosotros sois Eva y Bruno, y vuestros libros son vuestros libros.'),
    ('open', 'In Spain people say vosotros to several friends, while ustedes is formal. The verb ends in -áis, -éis or -ís.')]

spanish_between = [
    ('open', .6, .9, 'Abridla.'),                                         # what is opened is lost
    ('eat', .5, .9, 'Eva y Bruno, coméis.'), ('eat', .5, .9, 'Coméis pan.'),
    ('eat', .6, .95, 'Comeis sopa.'), ('will_do', .6, .95, 'Hareis los deberes.'),      # an accent is missing
    ('eat', .4, .8, 'Vosotros comeréis sopa.'), ('opened', .4, .8, 'Abrís la puerta.'),  # another time
    ('books', .4, .8, 'Eva y Bruno, traed sus libros.'),                   # whose books?
    ('books', .8, .95, 'Eva y Bruno, traed los libros.'),
    ('wash', .4, .8, 'Vosotros se laváis las manos.'), ('wash', .4, .8, 'Vosotros laváis las manos.'),    # the pronoun
    ('books', .8, .95, 'Eva y Bruno, traed vuestras libros.'), ('go', .8, .95, 'Id mercado.'), ('go', .8, .97, 'Id a mercado.'),
    ('open', .5, .92, 'You can say to them: "Abrid la puerta."'), ('open', .85, .98, 'Abrid la puerta'),
    ('open', .6, .95, 'Abrid la puerta. Abrid la puerta. Abrid la puerta.')]

spanish_bands = ([(k, .9001, 1., r) for k, r in spanish_keeps] + [(k, 0., .3, r) for k, r in spanish_breaks]
                 + [(k, 0., .3, r) for k, r in spanish_empty] + spanish_between)

@pytest.mark.parametrize('what,low,high,reply', lease_bands)
def test_leases_band(what, low, high, reply):
    got = score_leases(asked[what], reply)
    assert low <= got <= high, f'{got:.2f} outside [{low:.2f}, {high:.2f}] for {what}: {reply}'

@pytest.mark.parametrize('what,low,high,reply', spanish_bands)
def test_spanish_band(what, low, high, reply):
    got = score_spanish(said[what], reply)
    assert low <= got <= high, f'{got:.2f} outside [{low:.2f}, {high:.2f}] for {what}: {reply}'

def test_how_many():
    for bands in (lease_bands, spanish_bands): assert len({r for *_, r in bands if r.strip()}) >= 60

# --- the tasks ---------------------------------------------------------------------------------------------------------------------

@both
def test_gold_replies(task, grammar):
    t = once[task]()
    for r in t.train + t.valid + t.test: assert t.score(r, r['completion']) > .95, r

@both
def test_rows(task, grammar):
    t = once[task]()
    assert len(t.train) >= 2000 and len(t.valid) >= 90 and len(t.test) >= 90
    rows = t.train + t.valid + t.test
    assert len({r['prompt'] for r in rows}) == len(rows)
    for r in rows:
        assert not set('{}') & set(r['prompt'] + r['completion']), r
        assert len(r['prompt'].split()) <= 30 and len(r['completion'].split()) <= 32, r
        assert t.score(r, r['prompt']) < .2 and t.score(r, '') == 0, r

@both
def test_disjoint(task, grammar):
    "No filler, prompt or reply of one split is in another."
    for slot, options in grammar.items():
        for a, b in itertools.combinations(('train', 'valid', 'test'), 2): assert not set(options[a]) & set(options[b]), slot
    t = once[task]()
    for a, b in itertools.combinations((t.train, t.valid, t.test), 2):
        for key in ('prompt', 'completion'): assert not {r[key] for r in a} & {r[key] for r in b}

@both
def test_seeds(task, grammar):
    a, b, c = once[task](), task(), task(seed=1)
    assert (a.train, a.valid, a.test, a.shots) == (b.train, b.valid, b.test, b.shots) and a.train != c.train and a.test != c.test

@both
def test_instruction_and_shots(task, grammar):
    "The instruction and the shots help; handed back as a reply, neither is worth anything."
    t = once[task]()
    assert scenarios[t.name] is task and len(t.shots) == 3 and all(r in t.train for r in t.shots)
    assert all(t.score(r, t.instruction) <= .35 for r in t.test)
    assert sum(t.score(r, s['completion']) for r in t.test for s in t.shots)/len(t.test)/3 < .3    # a reply learned by heart

@both
def test_score_refuses_what_it_cannot_read(task, grammar):
    t = once[task]()
    with pytest.raises(ValueError, match='topic|verb'): t.score({'prompt': 'x'}, 'y')
    with pytest.raises(TypeError, match='reply'): t.score(t.test[0], None)

def test_score_names_what_is_unknown():
    with pytest.raises(ValueError, match="'France'.*Aldmark"): score_leases({**asked['A_late'], 'jurisdiction': 'France'}, 'x')
    with pytest.raises(ValueError, match="'aorist'.*present"): score_spanish({**said['open'], 'tense': 'aorist'}, 'x')
    with pytest.raises(ValueError, match="'casa'.*infinitive"): score_spanish({**said['open'], 'verb': 'casa'}, 'x')

@pytest.mark.parametrize('change', [lambda s: s.replace("'", '’'), lambda s: '  ' + s + '\n', lambda s: s.replace('\n', '\n\n'), lambda s: s.replace('\n', '  \n')])
def test_typography_does_not_matter(change):
    for k, r in lease_keeps: assert score_leases(asked[k], change(r)) > .9, change(r)
    for k, r in spanish_keeps: assert score_spanish(said[k], change(r)) > .9, change(r)

def test_each_clause_is_wrong_elsewhere():
    "A right clause breaks the rule once the client names another place, even with that place in the heading."
    for k, r in lease_keeps:
        row = asked[k]
        for place in set(leases_rules[row['topic']]) - {row['jurisdiction']}:
            other = {**row, 'jurisdiction': place}
            assert score_leases(other, r) <= .3, (place, r)
            assert score_leases(other, r.replace(row['jurisdiction'], place)) <= .3, (place, r)

def test_each_gold_clause_is_wrong_elsewhere():
    t = once[leases]()
    for r in t.train[:300] + t.valid + t.test:
        for place in set(leases_rules[r['topic']]) - {r['jurisdiction']}:
            assert t.score({**r, 'jurisdiction': place}, r['completion'].replace(r['jurisdiction'], place)) <= .3, (place, r)

def test_no_figure_is_invented():
    "Every number of every gold clause stands in the request; any other one breaks it, also as a word."
    t = once[leases]()
    numbers = lambda s: set(re.findall(r'[0-9][0-9,]*[0-9]|[0-9]', s))
    for r in t.train + t.valid + t.test: assert numbers(r['completion']) <= numbers(r['prompt']), r
    for r in t.test:
        for extra in ('It shall be repaid within 23 days.', 'It shall be repaid within three weeks.', 'Interest is 5% a year.', 'It is rounded to 17,000 euros.'):
            assert t.score(r, r['completion'] + '\n(c) ' + extra) <= .3, (extra, r)
        if r['figure'] and r['figure'] in r['completion']:
            n = r['figure'].split()[0]
            for wrong in (n + '1', '1' + n, n + '.5'): assert t.score(r, r['completion'].replace(n + ' ', wrong + ' ')) <= .3, (wrong, r)
        if not r['figure']:
            assert t.score(r, re.sub(r'\[\w+\]', '900 euros', r['completion'])) <= .3 or '[' not in r['completion'], r

def test_leases_cover_every_case():
    "Places and matters come in turn in every split, with a figure and without, so neither gives the rule away."
    t = once[leases]()
    for split in (t.train, t.valid, t.test):
        count = {c: sum((r['topic'], r['jurisdiction']) == c for r in split) for c in itertools.product(leases_rules, leases_rules['deposit'])}
        assert len(set(count.values())) == 1, count
        assert .1 < sum(not r['figure'] for r in split)/len(split) < .4

def test_money_is_read_in_any_form():
    row = asked['B_deposit']
    for money in ('1,250 euros', '1250 euros', '€1,250', 'EUR 1,250', '1.250 euros', 'one thousand two hundred and fifty euros', '1,250 (one thousand two hundred fifty) euros'):
        assert score_leases(row, f'§ 9. DEPOSIT (Borvia)\n(a) The Tenant shall pay {money}.\n(b) A notary shall hold it.') > .9, money
    for money in ('1,205 euros', '125 euros', '1,250 crowns', '£1,250', 'twelve hundred euros'):
        assert score_leases(row, f'§ 9. DEPOSIT (Borvia)\n(a) The Tenant shall pay {money}.\n(b) A notary shall hold it.') <= .3, money

# The forms, from a grammar book's tables and not from the conjugator: infinitive, then vosotros and ustedes in
# present, preterite, perfect, future, imperative, subjunctive.
tables = '''
hablar: habláis hablan, hablasteis hablaron, habéis hablado/han hablado, hablaréis hablarán, hablad hablen, habléis hablen
comer: coméis comen, comisteis comieron, habéis comido/han comido, comeréis comerán, comed coman, comáis coman
vivir: vivís viven, vivisteis vivieron, habéis vivido/han vivido, viviréis vivirán, vivid vivan, viváis vivan
pensar: pensáis piensan, pensasteis pensaron, habéis pensado/han pensado, pensaréis pensarán, pensad piensen, penséis piensen
contar: contáis cuentan, contasteis contaron, habéis contado/han contado, contaréis contarán, contad cuenten, contéis cuenten
jugar: jugáis juegan, jugasteis jugaron, habéis jugado/han jugado, jugaréis jugarán, jugad jueguen, juguéis jueguen
empezar: empezáis empiezan, empezasteis empezaron, habéis empezado/han empezado, empezaréis empezarán, empezad empiecen, empecéis empiecen
buscar: buscáis buscan, buscasteis buscaron, habéis buscado/han buscado, buscaréis buscarán, buscad busquen, busquéis busquen
entender: entendéis entienden, entendisteis entendieron, habéis entendido/han entendido, entenderéis entenderán, entended entiendan, entendáis entiendan
volver: volvéis vuelven, volvisteis volvieron, habéis vuelto/han vuelto, volveréis volverán, volved vuelvan, volváis vuelvan
pedir: pedís piden, pedisteis pidieron, habéis pedido/han pedido, pediréis pedirán, pedid pidan, pidáis pidan
seguir: seguís siguen, seguisteis siguieron, habéis seguido/han seguido, seguiréis seguirán, seguid sigan, sigáis sigan
sentir: sentís sienten, sentisteis sintieron, habéis sentido/han sentido, sentiréis sentirán, sentid sientan, sintáis sientan
dormir: dormís duermen, dormisteis durmieron, habéis dormido/han dormido, dormiréis dormirán, dormid duerman, durmáis duerman
coger: cogéis cogen, cogisteis cogieron, habéis cogido/han cogido, cogeréis cogerán, coged cojan, cojáis cojan
leer: leéis leen, leísteis leyeron, habéis leído/han leído, leeréis leerán, leed lean, leáis lean
tener: tenéis tienen, tuvisteis tuvieron, habéis tenido/han tenido, tendréis tendrán, tened tengan, tengáis tengan
venir: venís vienen, vinisteis vinieron, habéis venido/han venido, vendréis vendrán, venid vengan, vengáis vengan
hacer: hacéis hacen, hicisteis hicieron, habéis hecho/han hecho, haréis harán, haced hagan, hagáis hagan
poner: ponéis ponen, pusisteis pusieron, habéis puesto/han puesto, pondréis pondrán, poned pongan, pongáis pongan
decir: decís dicen, dijisteis dijeron, habéis dicho/han dicho, diréis dirán, decid digan, digáis digan
traer: traéis traen, trajisteis trajeron, habéis traído/han traído, traeréis traerán, traed traigan, traigáis traigan
salir: salís salen, salisteis salieron, habéis salido/han salido, saldréis saldrán, salid salgan, salgáis salgan
poder: podéis pueden, pudisteis pudieron, habéis podido/han podido, podréis podrán, poded puedan, podáis puedan
querer: queréis quieren, quisisteis quisieron, habéis querido/han querido, querréis querrán, quered quieran, queráis quieran
saber: sabéis saben, supisteis supieron, habéis sabido/han sabido, sabréis sabrán, sabed sepan, sepáis sepan
estar: estáis están, estuvisteis estuvieron, habéis estado/han estado, estaréis estarán, estad estén, estéis estén
ser: sois son, fuisteis fueron, habéis sido/han sido, seréis serán, sed sean, seáis sean
ir: vais van, fuisteis fueron, habéis ido/han ido, iréis irán, id vayan, vayáis vayan
dar: dais dan, disteis dieron, habéis dado/han dado, daréis darán, dad den, deis den
ver: veis ven, visteis vieron, habéis visto/han visto, veréis verán, ved vean, veáis vean
oír: oís oyen, oísteis oyeron, habéis oído/han oído, oiréis oirán, oíd oigan, oigáis oigan
abrir: abrís abren, abristeis abrieron, habéis abierto/han abierto, abriréis abrirán, abrid abran, abráis abran
escribir: escribís escriben, escribisteis escribieron, habéis escrito/han escrito, escribiréis escribirán, escribid escriban, escribáis escriban
conocer: conocéis conocen, conocisteis conocieron, habéis conocido/han conocido, conoceréis conocerán, conoced conozcan, conozcáis conozcan
comprar: compráis compran, comprasteis compraron, habéis comprado/han comprado, compraréis comprarán, comprad compren, compréis compren
cerrar: cerráis cierran, cerrasteis cerraron, habéis cerrado/han cerrado, cerraréis cerrarán, cerrad cierren, cerréis cierren
probar: probáis prueban, probasteis probaron, habéis probado/han probado, probaréis probarán, probad prueben, probéis prueben
perder: perdéis pierden, perdisteis perdieron, habéis perdido/han perdido, perderéis perderán, perded pierdan, perdáis pierdan
servir: servís sirven, servisteis sirvieron, habéis servido/han servido, serviréis servirán, servid sirvan, sirváis sirvan
lavarse: os laváis/se lavan, os lavasteis/se lavaron, os habéis lavado/se han lavado, os lavaréis/se lavarán, lavaos lávense, os lavéis/se laven
quitarse: os quitáis/se quitan, os quitasteis/se quitaron, os habéis quitado/se han quitado, os quitaréis/se quitarán, quitaos quítense, os quitéis/se quiten
sentarse: os sentáis/se sientan, os sentasteis/se sentaron, os habéis sentado/se han sentado, os sentaréis/se sentarán, sentaos siéntense, os sentéis/se sienten
acostarse: os acostáis/se acuestan, os acostasteis/se acostaron, os habéis acostado/se han acostado, os acostaréis/se acostarán, acostaos acuéstense, os acostéis/se acuesten
vestirse: os vestís/se visten, os vestisteis/se vistieron, os habéis vestido/se han vestido, os vestiréis/se vestirán, vestíos vístanse, os vistáis/se vistan
irse: os vais/se van, os fuisteis/se fueron, os habéis ido/se han ido, os iréis/se irán, idos váyanse, os vayáis/se vayan'''.strip().split('\n')

@pytest.mark.parametrize('line', tables, ids=lambda l: l.split(':')[0])
def test_conjugate(line):
    verb, forms = line.split(': ')
    for tense, pair in zip(('present', 'preterite', 'perfect', 'future', 'imperative', 'subjunctive'), forms.split(', ')):
        assert [conjugate(verb, tense, who) for who in ('vosotros', 'ustedes')] == pair.split('/' if '/' in pair else ' '), tense

def test_conjugate_refuses():
    for args, match in [(('casa', 'present'), 'infinitive'), (('abrir', 'past'), "unknown tense 'past'"), (('abrir', 'present', 'yo'), "'yo'")]:
        with pytest.raises(ValueError, match=match): conjugate(*args)

def test_ustedes_never_pays():
    "The sentence said to ustedes, or with one of its forms mixed in, stays at 0.3 or below for every row."
    t = once[spanish]()
    for r in t.train[:500] + t.valid + t.test:
        theirs = conjugate(r['verb'], r['tense'], 'ustedes')
        for reply in (f"{theirs} {r['rest']}.", f"Vosotros {theirs} {r['rest']}.", f"{r['completion']} Ustedes también.", f"{r['completion']} {theirs}."):
            assert t.score(r, reply) <= .3, reply

def test_another_verb_or_one_person_is_not_enough():
    t = once[spanish]()
    for r in t.test:
        other = next(v for v in ('cantar', 'leer') if v != r['verb'])
        assert t.score(r, f"Vosotros {conjugate(other, r['tense'])} {r['rest']}.") <= .3, r

def test_verbs_are_shared():
    "The forms are what is learned: each verb and tense of the test is also in training, in both registers."
    t = once[spanish]()
    kinds = lambda rows, *keys: {tuple(r[k] for k in keys) for r in rows}
    assert kinds(t.test, 'verb', 'tense') <= kinds(t.train, 'verb', 'tense') and len(kinds(t.train, 'verb', 'tense')) == 100
    assert {r['register'] for r in t.test} == {'english', 'american'}
    new = [r['rest'] for r in t.test if r['register'] == 'american']
    assert not set(new) & {r['rest'] for r in t.train if r['register'] == 'american' and (r['verb'], r['rest']) in {(q['verb'], q['rest']) for q in t.test}}
