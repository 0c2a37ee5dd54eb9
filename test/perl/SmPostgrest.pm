=head1 NAME

SmPostgrest - asks a database as PostgREST does, without PostgREST

=head1 SYNOPSIS

  use SmPostgrest;
  my $api = SmPostgrest->new($node, 'postgres', [qw(till manager)]);
  my $answer = $api->call('till', 'sync_run', { branch => 'b1' }, 'x-reason' => 'antes del corte');
  is($answer->{status}, 200);
  is($answer->{body}[0]{status}, 'success');
  $answer = $api->get('till', 'sync_history', 'branch_id = $$b1$$ ORDER BY id DESC LIMIT 1');
  $answer = $api->insert('till', 'public.sale', { id => 1, total => 9.5 }, 'x-reason' => 'venta normal');

=head1 DESCRIPTION

Each request is a connection of the role authenticator (LOGIN NOINHERIT), which has
the roles of users, and one transaction: it becomes the user's role with SET LOCAL,
puts the HTTP headers into request.headers, and runs one statement with named
arguments taken from a JSON object, whose result is a JSON text: the statements
that PostgREST 12 sends.  Functions that are not VOLATILE run READ ONLY, as do
reads.

An answer is { status, body, text }: status 200, 204 for what returns nothing, or as
PostgREST translates the SQLSTATE; body is the JSON decoded: the rows (objects), one
row where the function returns one, a value, or of an error its code, message,
details and hint.

called() names the functions that were called with success.

=cut

package SmPostgrest;

use strict;
use warnings;

use JSON::PP ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;

# Strings are UTF-8 throughout, in tests as on the wire.
my $json = JSON::PP->new->canonical->allow_nonref;

sub new
{
	my ($class, $node, $db, $roles) = @_;
	my $self = bless { node => $node, db => $db }, $class;

	$node->safe_psql($db, join(";\n", 'CREATE ROLE authenticator LOGIN NOINHERIT', map { ("CREATE ROLE $_ NOLOGIN", "GRANT $_ TO authenticator") } @$roles));
	return $self;
}

# What PostgREST keeps of a function in its schema cache: one row for each argument.
sub function
{
	my ($self, $name) = @_;
	my @rows = split /\n/, $self->{node}->safe_psql($self->{db}, qq{
		SELECT a.n > p.pronargs - p.pronargdefaults, a.name, format_type(a.type, NULL), p.provolatile, p.proretset, p.prorettype = 'void'::regtype,
			t.typtype = 'c' OR p.prorettype = 'record'::regtype
		FROM pg_proc p JOIN pg_type t ON t.oid = p.prorettype
			LEFT JOIN LATERAL (SELECT row_number() OVER (ORDER BY o), i.name, i.type
				FROM unnest(coalesce(p.proallargtypes, p.proargtypes::oid[]), p.proargnames, p.proargmodes) WITH ORDINALITY AS i (type, name, mode, o)
				WHERE coalesce(i.mode, 'i') IN ('i', 'b', 'v')) AS a (n, name, type) ON true
		WHERE p.pronamespace = 'softmobile'::regnamespace AND p.proname = '$name' ORDER BY a.n});
	my %function = (arguments => {});

	return unless @rows;
	foreach my $row (@rows)
	{
		my ($optional, $argument, $type, $volatility, $set, $void, $composite) = split /\|/, $row;

		%function = (%function, volatility => $volatility, set => $set eq 't', void => $void eq 't', composite => $composite eq 't');
		$function{arguments}{$argument} = { type => $type, optional => $optional eq 't' } if $argument ne '';
	}
	return \%function;
}

# POST /rpc/name; undef as an argument is null.
sub call
{
	my ($self, $role, $name, $arguments, %headers) = @_;
	my $function = $self->function($name);
	my @names = sort keys %$arguments;

	# PGRST202: no function of that name with these arguments.
	return { status => 404, body => { code => 'PGRST202' } }
	  if !$function || grep({ !$function->{arguments}{$_} } @names) || grep({ !$function->{arguments}{$_}{optional} && !exists $arguments->{$_} } keys %{ $function->{arguments} });

	my $quoted = sub { return '"' . $_[0] . '"'; };
	my $record = join(', ', map { $quoted->($_) . ' ' . $function->{arguments}{$_}{type} } @names);
	my $from = @names
	  ? ', LATERAL (SELECT ' . join(', ', map { $quoted->($_) } @names) . " FROM json_to_record(pgrst_payload.json_data) AS _($record) LIMIT 1) pgrst_body"
	  : '';
	my $invoked = qq{"softmobile"."$name"(} . join(', ', map { $quoted->($_) . ' := pgrst_body.' . $quoted->($_) } @names) . ')';
	my $body = $function->{composite} ? 'json_agg(_postgrest_t)' : 'json_agg(_postgrest_t.pgrst_scalar)';

	$from .= $function->{composite} ? ", LATERAL $invoked pgrst_call" : ", LATERAL (SELECT $invoked AS pgrst_scalar) pgrst_call";
	$body = $function->{set} ? "coalesce($body, '[]')" : "coalesce($body -> 0, 'null')";
	my $answer = $self->_request($role, 'POST', "/rpc/$name", $function->{volatility} ne 'v',
		"WITH pgrst_source AS (SELECT pgrst_call.* FROM (SELECT " . _literal($arguments) . "::json AS json_data) pgrst_payload$from)
		SELECT $body FROM (SELECT * FROM pgrst_source) _postgrest_t", %headers);

	$self->{called}{$name} = 1 if $answer->{status} == 200;
	return { status => 204 } if $answer->{status} == 200 && $function->{void};
	return $answer;
}

sub called { return sort keys %{ $_[0]{called} }; }

# GET /relation?select=columns&...: rest is what follows WHERE.
sub get
{
	my ($self, $role, $relation, $rest, $columns) = @_;

	return $self->_request($role, 'GET', "/$relation", 1,
		'WITH pgrst_source AS (SELECT ' . ($columns // "\"$relation\".*") . " FROM \"softmobile\".\"$relation\" WHERE " . ($rest // 'true') . ")
		SELECT coalesce(json_agg(_postgrest_t), '[]') FROM (SELECT * FROM pgrst_source) _postgrest_t");
}

# POST /table: one row or several of a table of the application's.
sub insert
{
	my ($self, $role, $table, $rows, %headers) = @_;
	my $first = ref $rows eq 'ARRAY' ? $rows->[0] : $rows;
	my $columns = join(', ', map { "\"$_\"" } sort keys %$first);

	return $self->_request($role, 'POST', "/$table", 0,
		"WITH pgrst_source AS (INSERT INTO $table ($columns)
			SELECT $columns FROM json_populate_recordset(NULL::$table, " . _literal(ref $rows eq 'ARRAY' ? $rows : [$rows]) . "::json) RETURNING *)
		SELECT coalesce(json_agg(_postgrest_t), '[]') FROM (SELECT * FROM pgrst_source) _postgrest_t", %headers);
}

# PATCH /table?...: where selects the rows.
sub update
{
	my ($self, $role, $table, $where, $values, %headers) = @_;
	my $set = join(', ', map { "\"$_\" = pgrst_body.\"$_\"" } sort keys %$values);

	return $self->_request($role, 'PATCH', "/$table", 0,
		"WITH pgrst_source AS (UPDATE $table SET $set
			FROM (SELECT * FROM json_populate_record(NULL::$table, " . _literal($values) . "::json)) AS pgrst_body WHERE $where RETURNING $table.*)
		SELECT coalesce(json_agg(_postgrest_t), '[]') FROM (SELECT * FROM pgrst_source) _postgrest_t", %headers);
}

sub _literal
{
	my $text = $json->encode($_[0]);

	die "cannot be quoted: $text" if $text =~ /\$json\$/;
	return "\$json\$$text\$json\$";
}

sub _request
{
	my ($self, $role, $method, $path, $read_only, $statement, %headers) = @_;
	my $settings = join(', ', map { my ($name, $value) = @$_; "set_config('$name', \$set\$$value\$set\$, true)" } (
		[ 'search_path', '"softmobile", "public"' ], [ 'role', $role ], [ 'request.jwt.claims', $json->encode({ role => $role }) ],
		[ 'request.method', $method ], [ 'request.path', $path ], [ 'request.headers', $json->encode(\%headers) ], [ 'request.cookies', '{}' ]));
	my $commands = join("\n",
		'\set VERBOSITY verbose', 'SET client_min_messages = error;', "SET client_encoding = 'UTF8';",
		'BEGIN ISOLATION LEVEL READ COMMITTED READ ' . ($read_only ? 'ONLY' : 'WRITE') . ';',
		"SELECT $settings \\g /dev/null", "$statement;", 'COMMIT;');

	utf8::downgrade($commands);
	my ($result, $out, $err) = $self->{node}->psql($self->{db}, $commands, extra_params => [ '-U', 'authenticator' ]);

	if ($result != 0)
	{
		my %error;

		die "not an SQL error: $err" unless $err =~ /ERROR:  (\w{5}): (.*?)(?=\n(?:LINE|DETAIL|HINT|QUERY|CONTEXT|SCHEMA NAME|TABLE NAME|LOCATION):? |\z)/s;
		%error = (code => $1, message => $2, details => undef, hint => undef);
		foreach my $field ([ DETAIL => 'details' ], [ HINT => 'hint' ])
		{
			$error{ $field->[1] } = $1 if $err =~ /^$field->[0]:  (.*?)(?=\n(?:HINT|QUERY|CONTEXT|SCHEMA NAME|TABLE NAME|LOCATION):? |\z)/ms;
		}
		return { status => _http_status($error{code}), body => \%error, text => $err };
	}
	return { status => 200, body => $json->decode($out), text => $out };
}

# As PostgREST translates an SQLSTATE.
sub _http_status
{
	my ($code) = @_;
	my @table = (
		[ qr/^08/ => 503 ], [ qr/^09|^2D|^38|^39|^3B|^40|^55|^57|^58|^F0|^HV|^XX/ => 500 ], [ qr/^0L|^0P|^28|^42501/ => 403 ],
		[ qr/^2350[35]/ => 409 ], [ qr/^25006/ => 405 ], [ qr/^25/ => 500 ], [ qr/^53400/ => 500 ], [ qr/^53/ => 503 ], [ qr/^54/ => 413 ],
		[ qr/^P0001/ => 400 ], [ qr/^P0/ => 500 ], [ qr/^42883|^42P01/ => 404 ]);

	foreach my $rule (@table)
	{
		return $rule->[1] if $code =~ $rule->[0];
	}
	return 400;
}

1;
