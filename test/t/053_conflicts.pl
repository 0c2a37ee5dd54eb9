# Conflicts, end to end: headquarters changes a row, the branch changes it too,
# somebody decides.  Whatever is decided, both hold the same row in the end, every
# event is at central, and nothing that nobody has seen is overwritten.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use SmShop;
use Test::More;

my $central = start_central();
my $gateway = start_gateway();
my $port = $gateway->{port};
my $token = "$PostgreSQL::Test::Utils::tmp_check/token";

open(my $file, '>', $token) or die "$token: $!";
print $file token('b1');
close($file);
chmod(0600, $token);

my $shop = SmShop->new(
	url      => "http://127.0.0.1:$port",
	branches => ['b1'],
	conf     => join("\n", "softmobile.auth_token_file = '$token'", 'softmobile.probe_interval = 1s', 'softmobile.batch_max_events = 20',
		"listen_addresses = '127.0.0.1'", ''));
my $node = $shop->node;

# Each change is stamped, as the application's own triggers do.
$shop->sql(q{
	CREATE TABLE item (id integer PRIMARY KEY, branch text NOT NULL DEFAULT 'b1', name text, price numeric(10,2), stamp bigint NOT NULL DEFAULT 1);
	CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN new.stamp := old.stamp + 1; RETURN new; END $$;
	CREATE TRIGGER stamp BEFORE UPDATE ON item FOR EACH ROW EXECUTE FUNCTION stamp();
	SELECT softmobile.attach('item', 'item', branch_column => 'branch')});

sub hq
{
	my ($id, $change) = @_;
	my $row = defined $change
	  ? "(SELECT row || '$change' FROM softmobile.central_projection WHERE entity_type = 'item' AND entity_id = '$id')"
	  : 'NULL';

	return $central->safe_psql('postgres', "SELECT softmobile.central_change('b1', 'item', '$id', $row, 'price list 12')");
}

# An item that both sides know.
sub item
{
	my ($id) = @_;

	$shop->change("INSERT INTO item (id, name, price) VALUES ($id, 'phone', 10)");
	return $shop->drains("item $id is at central");
}

# The id of the conflict about an item, as soon as it is known.
sub conflict
{
	my ($id, $name) = @_;
	my $query = "SELECT count(DISTINCT id) FROM softmobile.sync_conflicts WHERE entity_id = '$id'";

	$shop->comes_to($query, 1, $name // "a conflict about item $id");
	return $shop->sql("SELECT DISTINCT id FROM softmobile.sync_conflicts WHERE entity_id = '$id'");
}

sub fields
{
	my ($id) = @_;
	return $shop->sql("SELECT string_agg(concat_ws(' ', field, coalesce(old_value, '-'), coalesce(local_value, '-'), coalesce(central_value, '-')), '; ' ORDER BY field)
		FROM softmobile.sync_conflicts WHERE entity_id = '$id'");
}

sub resolve
{
	my ($conflict, $resolution, $reason) = @_;
	$reason //= 'asked the manager';
	return $shop->sql("SELECT change, columns, waiting FROM softmobile.resolve_conflict('$conflict', '$resolution', '$reason')");
}

# A call that fails: its SQLSTATE and message.
sub refusal
{
	my ($conflict, $resolution) = @_;
	my ($result, $out, $error) = $node->psql('postgres', "\\set VERBOSITY verbose\nSELECT softmobile.resolve_conflict('$conflict', '$resolution', 'asked the manager')");

	return $error =~ /ERROR:  (\w+): (.*)/ ? "$1 $2" : "no error: $out";
}

# Everything is delivered, and both sides hold the same row (or none): a test of each.
sub is_settled
{
	my ($id, $row, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$shop->drains("$name: everything is delivered");
	is($shop->sql("SELECT to_jsonb(i) - '{id,branch,stamp}'::text[] FROM item i WHERE id = $id"), $row, "$name: the branch's row");
	is($central->safe_psql('postgres', "SELECT row FROM softmobile.central_projection WHERE entity_type = 'item' AND entity_id = '$id' AND NOT deleted"),
		$shop->sql("SELECT to_jsonb(i) FROM item i WHERE id = $id"), "$name: central's is the same");
	is($central->safe_psql('postgres', 'SELECT count(*) FROM softmobile.central_conflicts'), 0, "$name: no conflict is left at central");
	is($shop->sql('SELECT count(*) FROM softmobile.sync_conflicts'), 0, "$name: nor at the branch");
	return;
}

# What central made of an item's events, in the order of their numbers.
sub effects
{
	my ($id) = @_;
	return $central->safe_psql('postgres', "SELECT string_agg(effect, ' ' ORDER BY epoch_no, seq) FROM softmobile.central_inbox WHERE entity_type = 'item' AND entity_id = '$id'");
}

# In which order an item's events came, those of a transaction at central together: prices.
sub arrivals
{
	my ($id) = @_;
	return $central->safe_psql('postgres', "SELECT string_agg(data -> 'new' ->> 'price', ' ' ORDER BY received_at, seq) FROM softmobile.central_inbox WHERE entity_type = 'item' AND entity_id = '$id'");
}

sub cut_link { stop_gateway($gateway); return; }

sub restore_link
{
	$gateway = start_gateway('--listen', "127.0.0.1:$port");
	return;
}

# ---------------------------------------------------------------------------
# For the branch

item(1);
hq(1, '{"price": 40, "name": "smartphone"}');
$shop->sql("SELECT softmobile.register_branch('b1', 'Branch b1', active => false)");
$shop->change("UPDATE item SET price = $_ WHERE id = 1") for 11, 12;
$shop->sql("SELECT softmobile.register_branch('b1', 'Branch b1')");
my $conflict = conflict(1, 'the first of two changes that were sent together is a conflict');
is(fields(1), 'name phone phone smartphone; price 10.00 11.00 40; stamp 1 2 1', 'side by side');
is( $shop->sql("SELECT string_agg(kind || ' ' || state, ', ' ORDER BY seq) FROM softmobile.outbox_exception WHERE entity_id = '1'"),
	'conflict failed, waiting failed', 'the second waits for it');
$shop->change('UPDATE item SET price = 13 WHERE id = 1');
$shop->comes_to("SELECT count(*) FROM softmobile.outbox_exception WHERE entity_id = '1' AND waits_for = '$conflict'", 2, 'so does a third');
is(resolve($conflict, 'local', 'more recent here'), 'none||2', 'resolved for the branch');
is_settled(1, '{"name": "phone", "price": 13.00}', 'local');
is(effects(1), 'applied applied applied applied', 'local: every event took effect');
is(arrivals(1), '10.00 11.00 12.00 13.00', 'local: in order');
is( $shop->sql("SELECT reason, ids, details ->> 'resolution' FROM softmobile.sync_audit WHERE action = 'resolve_conflict'"),
	"more recent here|{$conflict}|local", 'local: audited');
like(refusal($conflict, 'local'), qr/^55000 the conflict of event $conflict is resolved already/, 'it cannot be resolved twice');
like(refusal($conflict, 'central'), qr/^55000 the conflict of event $conflict is resolved already/, '... nor the other way');

# ---------------------------------------------------------------------------
# For central: what waits is overruled, whether the worker has read it or not

item(2);
hq(2, '{"price": 40, "name": "smartphone"}');
$shop->change('UPDATE item SET price = 11 WHERE id = 2');
$conflict = conflict(2);
$shop->change('UPDATE item SET price = 12 WHERE id = 2');
$shop->comes_to("SELECT count(*) FROM softmobile.outbox_exception WHERE entity_id = '2' AND kind = 'waiting'", 1, 'a later change waits');
cut_link();
$shop->change("INSERT INTO item SELECT i FROM generate_series(1000, 1099) i");
$shop->change('UPDATE item SET price = 13 WHERE id = 2', 'INSERT INTO item SELECT i FROM generate_series(1100, 1199) i');
is(resolve($conflict, 'central'), 'update|{name,price,stamp}|1', 'resolved for central, with the link down and changes in the log that nobody has read');
is($shop->sql('SELECT name, price FROM item WHERE id = 2'), 'smartphone|40.00', 'the branch has the row at once');
is($shop->sql('SELECT count(*) FROM softmobile.sync_conflicts'), 0, 'no open conflict is left');
like(refusal($conflict, 'central'), qr/^55000 the conflict of event $conflict is resolved already/, 'it cannot be resolved twice');
$shop->change('INSERT INTO item SELECT i FROM generate_series(1200, 1299) i', "UPDATE item SET name = 'tablet' WHERE id = 2");
$node->restart;
restore_link();
is_settled(2, '{"name": "tablet", "price": 40.00}', 'central');
is(effects(2), 'applied overruled overruled overruled applied applied', 'central: what came before is overruled, what came after is not');
is(arrivals(2), '10.00 11.00 12.00 13.00 40.00 40.00', 'central: in order');
is($shop->sql("SELECT array_to_string((array_agg(state ORDER BY seq))[1:4], ' ') FROM softmobile.outbox_exception WHERE entity_id = '2'"),
	'dropped dropped dropped delivered', 'central: and so says the branch');
is($shop->sql("SELECT reason FROM softmobile.outbox_event WHERE entity_id = '2' AND payload -> 'new' ->> 'price' = '40.00' ORDER BY seq LIMIT 1"),
	'asked the manager', 'central: captured with the reason of the decision');
is($central->safe_psql('postgres', "SELECT count(*) FROM softmobile.central_projection WHERE entity_type = 'item' AND entity_id::integer >= 1000"), 300,
	'other rows went on');

# The worker has put everything aside before it hears of the decision.
item(3);
hq(3, '{"price": 40}');
$shop->change('UPDATE item SET price = 11 WHERE id = 3');
$conflict = conflict(3);
$shop->sql("BEGIN; SELECT softmobile.resolve_conflict('$conflict', 'central', 'changed my mind'); ROLLBACK");
is($shop->sql('SELECT price FROM item WHERE id = 3'), '11.00', 'a decision that is rolled back changes nothing');
conflict(3, '... and leaves the conflict open');
is(resolve($conflict, 'central'), 'update|{price,stamp}|0', 'resolved for central');
$shop->change("UPDATE item SET name = 'phone $_' WHERE id = 3") for 1, 2;
is_settled(3, '{"name": "phone 2", "price": 40.00}', 'central, with changes right behind it');

# Two at once: the second waits, and hears that it is done.
item(4);
hq(4, '{"price": 40}');
$shop->change('UPDATE item SET price = 11 WHERE id = 4');
$conflict = conflict(4);
my $first = $node->background_psql('postgres');
$first->query_safe("BEGIN; SELECT softmobile.resolve_conflict('$conflict', 'central', 'asked the manager')");
my ($result, $out, $error) = $node->psql('postgres', "SET lock_timeout = '100ms'; SELECT softmobile.resolve_conflict('$conflict', 'local', 'asked another')");
like($error, qr/lock timeout/, 'a second caller waits for the first');
$first->query_safe('COMMIT');
$first->quit;
like(refusal($conflict, 'local'), qr/^55000 the conflict of event $conflict is resolved already/, '... and is told so');
is_settled(4, '{"name": "phone", "price": 40.00}', 'two at once');

# ---------------------------------------------------------------------------
# Headquarters changes the row once more

item(5);
hq(5, '{"price": 40}');
$shop->change('UPDATE item SET price = 11 WHERE id = 5');
$conflict = conflict(5);
cut_link();
resolve($conflict, 'local');
hq(5, '{"price": 41}');
restore_link();
is(conflict(5, 'after a decision on a row that is not central\'s any more, there is a conflict again'), $conflict, '... about the same event');
is(fields(5), 'price 10.00 11.00 41; stamp 1 2 1', '... with the row of now');
is($shop->sql("SELECT resolution IS NULL FROM softmobile.outbox_exception WHERE id = '$conflict'"), 't', '... which nobody has decided');
cut_link();
resolve($conflict, 'central');
hq(5, '{"price": 42}');
restore_link();
my $second = conflict(5, 'the same when central\'s row was taken over');
isnt($second, $conflict, '... now about the change that did so');
is(fields(5), 'price 11.00 41.00 42; stamp 2 3 1', '... with the row of now');
resolve($second, 'central');
is_settled(5, '{"name": "phone", "price": 42.00}', 'decided on the third row');

# ---------------------------------------------------------------------------
# Deleted on one side

item(6);
hq(6, undef);
$shop->change('UPDATE item SET price = 11 WHERE id = 6');
$conflict = conflict(6);
like(fields(6), qr/^\(row\) \{.*10\.00.*\} \{.*11\.00.*\} \(deleted\)$/, 'deleted at headquarters, changed at the branch: shown');
is(resolve($conflict, 'central'), 'delete||0', '... resolved for central');
is_settled(6, '', 'deleted at headquarters');

item(7);
hq(7, undef);
$shop->change('UPDATE item SET price = 11 WHERE id = 7');
resolve(conflict(7), 'local');
is_settled(7, '{"name": "phone", "price": 11.00}', 'deleted at headquarters, kept by the branch');

item(8);
hq(8, '{"price": 40}');
$shop->change('DELETE FROM item WHERE id = 8');
$conflict = conflict(8);
like(fields(8), qr/^\(row\) \{.*10\.00.*\} \(deleted\) \{.*40.*\}$/, 'deleted at the branch, changed at headquarters: shown');
is(resolve($conflict, 'central'), 'insert|{id,branch,name,price,stamp}|0', '... resolved for central');
is_settled(8, '{"name": "phone", "price": 40.00}', 'deleted at the branch');

item(9);
hq(9, '{"price": 40}');
$shop->change('DELETE FROM item WHERE id = 9');
resolve(conflict(9), 'local');
is_settled(9, '', 'deleted at the branch for good');

# The row goes while the conflict is open.
item(10);
hq(10, '{"price": 40}');
$shop->change('UPDATE item SET price = 11 WHERE id = 10');
$conflict = conflict(10);
$shop->change('DELETE FROM item WHERE id = 10');
like(refusal($conflict, 'central'), qr/^55000 row 10 of table "item" is gone$/, 'deleted meanwhile: cannot be resolved for central');
is($shop->sql("SELECT count(*) FROM softmobile.sync_audit WHERE ids = ARRAY['$conflict'::uuid]"), 0, '... and nothing of it was done');
resolve($conflict, 'local');
is_settled(10, '', '... but for the branch, which has deleted it');

# ---------------------------------------------------------------------------
# The decision comes first to central, and is lost on the way back

item(11);
hq(11, '{"price": 40}');
$shop->change('UPDATE item SET price = 11 WHERE id = 11');
$conflict = conflict(11);
my $release = hold_branch();
resolve($conflict, 'central');
wait_until('the event is on its way', sub { waiting() > 0 });
$node->stop('immediate');
$release->();
$node->start;
is_settled(11, '{"name": "phone", "price": 40.00}', 'a crash while the decision is on its way');
is(effects(11), 'applied overruled applied', '... takes effect once');

# ---------------------------------------------------------------------------
# The audit of retries

is($shop->sql('SELECT convert_to(softmobile.automatic_reason(), \'UTF8\')'), '\\x5265696e74656e746f206175746f6dc3a17469636f2070726f6772616d61646f', 'the reason of automatic requeues');
$shop->sql("CREATE DATABASE latin1 ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
$node->safe_psql('latin1', 'CREATE EXTENSION softmobile');
is($node->safe_psql('latin1', 'SELECT convert_to(softmobile.automatic_reason(), \'UTF8\'), octet_length(softmobile.automatic_reason())'),
	'\\x5265696e74656e746f206175746f6dc3a17469636f2070726f6772616d61646f|31', '... in LATIN1 too');

$shop->change(q{INSERT INTO sale (id, branch) VALUES (repeat('x', 2001), 'b1')});
$shop->fails_with(qr/^rejected: subject must be at most 2000 bytes long$/, 'an event that central rejects');
my $id = $shop->sql("SELECT id FROM softmobile.sync_outbox WHERE status = 'FAILED'");
$shop->sql('CREATE ROLE manager; GRANT manager TO ' . $shop->sql('SELECT quote_ident(current_user)'));
$shop->sql("SELECT softmobile.grant_role('manager', 'operator')");
my $user = $shop->sql('SELECT session_user');
$node->psql('postgres', "SET ROLE manager; SELECT softmobile.sync_outbox_retry(ARRAY['$id'::uuid], ' central was told of it ')",
	on_error_die => 1, connstr => sprintf('host=127.0.0.1 port=%d dbname=postgres application_name=till3', $node->port));
is( $shop->sql("SELECT reason, events, ids, session_user_name, current_user_name, client_addr, application_name, at <= clock_timestamp() FROM softmobile.sync_audit WHERE action = 'retry'"),
	"central was told of it|1|{$id}|$user|manager|127.0.0.1|till3|t", 'a manual retry: who, from where, with what, why, which');

is($central->safe_psql('postgres', 'SELECT count(*) FROM softmobile.central_forks'), 0, 'no number was used twice');
$shop->stop;
stop_gateway($gateway);
done_testing();
