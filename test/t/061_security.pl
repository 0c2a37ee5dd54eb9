# Access at the branch: what is planted before the extension comes, what the owner
# of a table plants in it, where the worker may send, and where the token shows.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmReceiver;
use SmShop;
use Test::More;

my $central = SmReceiver->new;
my $token = 's3cret-of-branch-b1';
my $token_file = PostgreSQL::Test::Utils::tempdir . '/token';
append_to_file($token_file, "$token\n");
chmod 0600, $token_file;

my $shop = SmShop->new(
	url      => $central->url,
	branches => ['b1'],
	conf     => "softmobile.auth_token_file = '$token_file'\nsoftmobile.probe_interval = 1s\nsoftmobile.retry_interval = 1s\nlog_min_messages = debug2\n");
my $node = $shop->node;

# A command of a role in a session of its own: its output, or its error.
sub as_role
{
	my ($role, $command, $db) = @_;
	my ($status, $out, $err) = $node->psql($db // 'postgres', $command, extra_params => [ '-U', $role ]);
	return $err ne '' ? $err : $out;
}

# What CREATE EXTENSION says in a new database after some commands; '': nothing.
sub installing_after
{
	my (@commands) = @_;
	$shop->sql('DROP DATABASE IF EXISTS planted');
	$shop->sql('CREATE DATABASE planted');
	$node->safe_psql('planted', join(";\n", @commands)) if @commands;
	my ($status, $out, $err) = $node->psql('planted', 'CREATE EXTENSION softmobile');
	return $err;
}

# ---------------------------------------------------------------------------
# The install script

{
	my $script = join('', map { slurp_file($_) } sort glob("$FindBin::RealBin/../../sql/install/*.sql"));
	$script =~ s{/\*.*?\*/}{}gs;
	$script =~ s/--.*$//mg;
	$script =~ s/'(?:[^']|'')*'/''/g;
	ok($script =~ /^\s*\\echo [^\n]*\\quit\s+SET LOCAL search_path = pg_catalog, pg_temp;/, 'names in the install script are looked up in pg_catalog');
	is_deeply([ $script =~ /(search_path = (?!pg_catalog, pg_temp).*)/g ], [], 'and nowhere else, at any time');
	is_deeply([ $script =~ /(.*CREATE\s+(?:OR\s+REPLACE|\w+\s+IF\s+NOT\s+EXISTS).*)/g ], [], 'nothing that is there already is taken for ours');
	my @unqualified = grep { !/^CREATE (?:EVENT TRIGGER softmobile_\w+|(?:BRIN |UNIQUE )?INDEX \w+ ON softmobile\.|TRIGGER \w+ [A-Z ,_a-z]+ ON softmobile\.|(?:FUNCTION|PROCEDURE|TABLE|VIEW|TYPE|SEQUENCE) softmobile\.)/ }
	  $script =~ /^(CREATE .*)$/mg;
	is_deeply(\@unqualified, [], 'everything it makes lies in its schema');
}

$shop->sql('CREATE ROLE planter LOGIN; CREATE ROLE mighty');
is(installing_after(), '', 'an empty database');
is($node->safe_psql('planted', q{SET client_encoding = 'LATIN1'; DROP EXTENSION softmobile; CREATE EXTENSION softmobile; SHOW search_path; SHOW client_encoding}),
	qq{"\$user", public\nLATIN1}, 'the script leaves the settings of the session alone');
like(installing_after('CREATE SCHEMA softmobile AUTHORIZATION planter'), qr/^\S+ WARNING:  schema softmobile belonged to planter, who is no superuser\nDETAIL:  It belongs to \w+ now/,
	'a schema of somebody else');
is($node->safe_psql('planted', q{SELECT r.rolsuper, has_schema_privilege('planter', 'softmobile', 'CREATE') FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner WHERE n.nspname = 'softmobile'}),
	't|f', 'is taken from him');
like(installing_after('CREATE SCHEMA softmobile', 'GRANT CREATE ON SCHEMA softmobile TO planter'), qr/role planter may create objects in schema softmobile.*HINT:  REVOKE CREATE/s,
	'one that somebody may create in');
like(installing_after('CREATE SCHEMA softmobile', 'GRANT CREATE ON SCHEMA softmobile TO PUBLIC'), qr/everybody may create objects in schema softmobile/, 'or everybody');
my $trap = q{LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'trapped'; END$$};
for my $case (
	[ 'a function that fits better' => "CREATE FUNCTION softmobile.btrim(text, text) RETURNS text $trap" ],
	[ 'a function of ours'          => "CREATE FUNCTION softmobile.current_reason() RETURNS text $trap" ],
	[ 'an overloaded one of ours'   => "CREATE FUNCTION softmobile.known_branch(varchar) RETURNS text $trap" ],
	[ 'a table of ours'             => 'CREATE TABLE softmobile.outbox_event (seq bigint)' ],
	[ 'a type'                      => 'CREATE TYPE softmobile.text AS (t integer)' ],
	[ 'a domain'                    => 'CREATE DOMAIN softmobile.d AS text' ],
	[ 'an operator'                 => 'CREATE OPERATOR softmobile.= (LEFTARG = text, RIGHTARG = name, FUNCTION = pg_catalog.texteqname)' ],
	[ 'a collation'                 => 'CREATE COLLATION softmobile."C" FROM "POSIX"' ])
{
	my ($name, $command) = @$case;
	like(installing_after('CREATE SCHEMA softmobile', 'GRANT CREATE, USAGE ON SCHEMA softmobile TO planter', 'SET ROLE planter', $command, 'RESET ROLE', 'REVOKE ALL ON SCHEMA softmobile FROM planter'),
		qr/schema softmobile holds objects of others\nDETAIL:  \w.* softmobile.* belongs to planter\.\nHINT/, "$name in the schema");
}
is(installing_after('CREATE SCHEMA softmobile', 'CREATE SEQUENCE softmobile.lane_1_seq', 'CREATE VIEW softmobile.mine AS SELECT 1'), '', 'what a superuser has left there is no trap');
is(installing_after('CREATE SCHEMA softmobile'), '', 'an empty schema is as good as none');

# What is planted in public, where everybody may create here, is not found.
is(installing_after(
	'GRANT CREATE ON SCHEMA public TO PUBLIC', 'SET ROLE planter',
	map({ "CREATE FUNCTION public.$_ RETURNS text $trap" } 'btrim(varchar)', 'lower(varchar)', 'format(text, text)', 'current_reason()', 'known_branch(text)', 'convert_to(text, text)'),
	"CREATE FUNCTION public.same(text, varchar) RETURNS boolean $trap", 'CREATE OPERATOR public.= (LEFTARG = text, RIGHTARG = varchar, FUNCTION = public.same)',
	'CREATE TABLE public.branch (branch_id text)', 'CREATE TABLE public.pg_class (oid oid)'), '', 'planted in public');
is($node->safe_psql('planted', q{SET search_path = public, softmobile, pg_catalog; SELECT softmobile.register_branch('b1', 'Centro'); SELECT count(*) FROM softmobile.sync_overview}),
	"\n1", 'and what was installed works, whatever the path of who calls');

# Rights that the installing superuser gives on all that he makes.
is(installing_after(map { "ALTER DEFAULT PRIVILEGES GRANT ALL ON $_ TO PUBLIC, mighty" } qw(TABLES SEQUENCES FUNCTIONS)), '', 'default privileges');
is($node->safe_psql('planted', q{
	SELECT softmobile.register_branch('b1', 'Centro');
	SELECT count(*) FROM pg_class c, aclexplode(c.relacl) a WHERE c.relnamespace = 'softmobile'::regnamespace AND a.grantee <> c.relowner;
	SELECT string_agg(DISTINCT p.proname, ' ') FROM pg_proc p, aclexplode(p.proacl) a WHERE p.pronamespace = 'softmobile'::regnamespace AND a.grantee <> p.proowner}),
	"\n0\ncurrent_reason set_reason", 'give nobody anything of ours, nor of what is made later');
$shop->sql('DROP DATABASE planted');

# ---------------------------------------------------------------------------
# Tables of the application, which belongs to it: reading them runs what it likes

$shop->sql(q{
	CREATE ROLE pos LOGIN;
	CREATE ROLE clerk LOGIN;
	SELECT softmobile.grant_role('pos', 'app'), softmobile.grant_role('clerk', 'app');
	CREATE SCHEMA pos AUTHORIZATION pos;
	GRANT USAGE ON SCHEMA pos TO clerk;
	SET ROLE pos;
	CREATE TYPE pos.colour AS ENUM ('red', 'blue');
	CREATE TABLE pos.ventas (id integer PRIMARY KEY, store_id text, folio text, total numeric, fecha date, colour pos.colour);
	CREATE TABLE pos.lines (id integer, day date NOT NULL, store_id text, folio text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
	CREATE TABLE pos.lines_1 PARTITION OF pos.lines FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
	RESET ROLE;
	SELECT softmobile.attach('pos.ventas', 'ticket', branch_column => 'store_id', folio_column => 'folio', amount_column => 'total', date_column => 'fecha', require_reason => false),
		softmobile.attach('pos.lines', 'ticket_line', branch_column => 'store_id', folio_column => 'folio', require_reason => false);
	INSERT INTO pos.ventas VALUES (1, 'b1', 'A-1', 10, current_date, 'red'), (2, 'b1', 'A-3', 5, current_date, 'blue');
	INSERT INTO pos.lines VALUES (1, '2026-05-05', 'b1', 'L-1');
	-- The planner simplifies these, by calling what is called with constants.
	SET ROLE pos;
	CREATE FUNCTION pos.trap(integer) RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 1';
	CREATE INDEX ON pos.ventas ((pos.trap(1)));
	CREATE INDEX ON pos.ventas (id) WHERE pos.trap(2) = 1;
	CREATE INDEX ON pos.lines_1 ((pos.trap(3)));
	CREATE STATISTICS pos.trap_statistics ON (id + pos.trap(4)), folio FROM pos.ventas;
	ALTER TABLE pos.ventas ADD CHECK (id > 0 AND pos.trap(5) = 1);
	ALTER TABLE pos.lines_1 ADD CHECK (id > 0 AND pos.trap(6) = 1);
	CREATE POLICY trap ON pos.ventas USING (pos.trap(7) = 1);
	ALTER TABLE pos.ventas ENABLE ROW LEVEL SECURITY;
	CREATE OR REPLACE FUNCTION pos.trap(integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS $$
	BEGIN
		IF (SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = current_user) THEN
			RAISE EXCEPTION 'trap % runs as %', $1, current_user;
		END IF;
		PERFORM pg_catalog.set_config('search_path', 'pos', false);
		RETURN 1;
	END
	$$;
	CREATE FUNCTION pos.colour_json(pos.colour) RETURNS json LANGUAGE plpgsql IMMUTABLE AS 'BEGIN PERFORM pos.trap(8); RETURN ''"x"''; END';
	CREATE CAST (pos.colour AS json) WITH FUNCTION pos.colour_json(pos.colour);
});
like(as_role('postgres', "SELECT count(*) FROM pos.$_"), qr/trap \d runs as postgres/, "a superuser who reads $_ is caught") for qw(ventas lines);
my $log_offset = -s $node->logfile;
is(as_role('clerk', q{SELECT entity_type, sum(count), min(problem) FROM softmobile.folio_control_of('b1') GROUP BY 1 ORDER BY 1}), "ticket|2|\nticket_line|1|",
	'folio_control_of() is not');
is(as_role('clerk', q{SELECT sum(count), min(problem) FROM softmobile.folio_control}), '3|', 'nor folio_control');
like(as_role('clerk', q{SELECT softmobile.sync_explain('A-3')}), qr/^Receipt A-3 \(ticket 2 of branch b1\)(?!.*trap)/, 'nor sync_explain()');
like(as_role('clerk', q{SELECT softmobile.sync_explain('L-1')}), qr/^Receipt L-1 \(ticket_line (?!.*trap)/, 'nor of a partition');
$central->route('POST /reconcile', status => 200, body => { branch => 'b1', entity_type => 'ticket', rows => 0, buckets => [] });
unlike(as_role('clerk', q{SELECT count(*), current_setting('search_path') FROM softmobile.reconcile('b1', '2020-01-01', '2030-01-01')}), qr/trap|pos/, 'nor reconcile()');
unlike(as_role('clerk', q{SELECT count(*) FROM softmobile.offline_checklist('b1') WHERE detail ~ 'trap'}), qr/trap|^[1-9]/, 'nor offline_checklist()');
unlike(as_role('clerk', q{SELECT step, detail FROM softmobile.prepare_offline('b1')}), qr/trap/, 'nor prepare_offline()');
# The worker, which is a superuser here, queues the rows that are there.
$shop->sql(q{SELECT softmobile.detach('pos.ventas');
	SELECT softmobile.attach('pos.ventas', 'ticket', branch_column => 'store_id', folio_column => 'folio', initial => 'snapshot', require_reason => false)});
$shop->comes_to(q{SELECT count(*) FROM softmobile.sync_outbox WHERE priority = 'LOW'}, 2, 'nor the worker that queues existing rows');
$shop->sell('b1', 'S-1');
$shop->drains('and it goes on');
is_deeply([ grep { /trap \d runs as/ } split /\n/, slurp_file($node->logfile, $log_offset) ], [], 'no trap has caught anybody of ours');

# ---------------------------------------------------------------------------
# The worker

my $worker = q{SELECT detail FROM softmobile.offline_checklist('b1') WHERE code = 'worker'};
like($shop->sql($worker), qr/^Since .*, as \w+, a superuser: softmobile\.worker_role can name/, 'the checklist tells of a worker that is a superuser');
$shop->sql(q{CREATE ROLE courier LOGIN; SELECT softmobile.grant_role('courier', 'worker')});
$shop->sql($_) for q{ALTER SYSTEM SET softmobile.worker_role = 'courier'}, 'SELECT pg_reload_conf()';
$shop->comes_to(q{SELECT count(*) FROM pg_stat_activity a JOIN softmobile.worker_status() w USING (pid) WHERE a.usename = 'courier'}, 1, 'a role that may do less');
like($shop->sql($worker), qr/^Since .*, as courier\.$/, 'and of one that is not');
$shop->sell('b1', 'S-0');
$shop->drains('it delivers');

# ---------------------------------------------------------------------------
# Where the worker may send

sub reload
{
	my (@settings) = @_;
	$shop->sql(join(";\n", (map { "ALTER SYSTEM SET $_" } @settings), 'SELECT pg_reload_conf()'));
	return;
}

for my $bad ('10.0.0.0/33', 'central.example', '10.0.0.1/8', '10.0.0.0/8;', '10', '::1/129', '10.0.0.0/8, x')
{
	my ($status, undef, $err) = $node->psql('postgres', "ALTER SYSTEM SET softmobile.central_networks = '$bad'");
	like($err, qr/invalid value for parameter "softmobile.central_networks".*DETAIL.*HINT:  List addresses/s, "no network: $bad");
}
$shop->result_is($_, 'ok', $_) for map { "ALTER SYSTEM SET softmobile.central_networks = '$_'; SELECT 'ok'" } '', '10.0.0.0/8', ' 10.0.0.0/8 ,192.0.2.7,2001:db8::/32', '::1 127.0.0.1';

$central->drop_connections;
reload(q{softmobile.central_networks = '10.0.0.0/8, 2001:db8::/32'});
$node->poll_query_until('postgres', q{SELECT current_setting('softmobile.central_networks') LIKE '10.%'});
$central->forget_requests;
$shop->sell('b1', 'S-2');
$shop->fails_with(qr/^configuration: the server's address is not in softmobile\.central_networks$/, 'the worker sends nothing elsewhere');
is(scalar($central->requests), 0, 'not one request');
like(as_role('clerk', q{SELECT softmobile.reconcile('b1', '2020-01-01', '2030-01-01')}),
	qr/central cannot be asked: the server's address is not in softmobile.central_networks/, 'nor does who asks central');
is(scalar($central->requests), 0, 'still not one');
reload(q{softmobile.central_networks = '127.0.0.0/8'});
$shop->drains('once the address is allowed, what waits goes');

# ---------------------------------------------------------------------------
# Settings

for my $setting ("central_url = 'http://127.0.0.1'", "auth_token_file = '/etc/passwd'", "branch_id = 'b2'", 'enable_transfers = off', 'drop_undelivered = on')
{
	like(as_role('clerk', "SET softmobile.$setting"), qr/permission denied to set parameter/, "nobody sets $setting");
	like(as_role('clerk', "ALTER ROLE clerk SET softmobile.$setting"), qr/permission denied to set parameter/, 'nor for later');
}
for my $setting ("central_networks = ''", "ca_file = '/tmp/x'", "client_key_file = '/tmp/x'", "worker_role = 'clerk'", 'unknown_branch = register')
{
	like(as_role('clerk', "SET softmobile.$setting"), qr/cannot be changed now/, "nobody sets $setting");
}
like(as_role('clerk', 'SET session_replication_role = replica'), qr/permission denied/, 'nobody switches the capture off');
like(as_role('clerk', "SHOW softmobile.$_"), qr/must be superuser|permission denied|pg_read_all_settings/, "nor reads $_") for qw(auth_token_file client_key_file);

# ---------------------------------------------------------------------------
# The token

is($central->requests(path => '/events') > 0 ? ($central->batches)[-1]{headers}{authorization} : '', "Bearer $token", 'the token is sent');
$central->answer('status', status => 401);
$shop->sell('b1', 'S-3');
$shop->fails_with(qr/^http 401/, 'a token that is refused');
chmod 0644, $token_file;
$shop->sql(q{SELECT softmobile.requeue_failed_outbox_entries('b1', '0')});
$shop->comes_to(q{SELECT count(*) FROM softmobile.sync_outbox WHERE error_message = 'token: the file can be read or written by everybody; chmod 600 it'}, 1, 'one that others can read is not used');
{
	my $tables = $shop->sql(q{SELECT string_agg(format('SELECT %L, t::text FROM softmobile.%I AS t WHERE strpos(t::text, %L) > 0', relname, relname, 's3cret'), ' UNION ALL ')
		FROM pg_class WHERE relnamespace = 'softmobile'::regnamespace AND relkind IN ('r', 'v') AND relname <> 'folio_control'});
	is($shop->sql($tables), '', 'the token is in no table and no view');
	is($shop->sql(q{SELECT query FROM pg_stat_activity WHERE strpos(query, 's3cret') > 0 AND pid <> pg_backend_pid()}), '', 'nor in pg_stat_activity');
	is($shop->sql(q{SELECT name FROM pg_settings WHERE strpos(setting, 's3cret') > 0}), '', 'nor in a setting');
	unlike(as_role('clerk', q{SELECT string_agg(d::text, ' ') FROM softmobile.offline_checklist('b1') AS d}), qr/s3cret/, 'nor in the checklist');
	unlike(as_role('postgres', q{SELECT softmobile.metrics()}), qr/s3cret/, 'nor in the metrics');
	my ($dump, $err) = run_command([ 'pg_dump', '--dbname', $node->connstr('postgres') ]);
	like($dump, qr/COPY softmobile\.outbox_event/, 'a dump');
	ok($dump !~ /s3cret/, 'holds no token');
	# but for the statements just above
	is_deeply([ grep { /s3cret/ && !/strpos/ } split /\n/, slurp_file($node->logfile) ], [], 'nor does the log, at debug2');
}
chmod 0600, $token_file;
$central->answer('receipt');
$shop->sql(q{SELECT softmobile.requeue_failed_outbox_entries('b1', '0')});
$shop->drains('all arrives in the end');
is($central->log_text, '', 'nothing unexpected in the receiver');
$shop->stop;
done_testing();
